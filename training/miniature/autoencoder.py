"""A TAESD-shaped autoencoder, narrow: 64x64 pictures <-> 4x8x8 latents of about unit variance.

The layers stand where ComfyUI's TAESD has them, so that zeros around the weights make it the host's; see `expand`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from training.miniature.fit import Fit, fit
from training.miniature.pictures import pictures
from training.miniature.weights import read, save

WIDTHS = (16, 32, 64, 64)  # of the layers at 64, 32, 16 and 8 pixels
BLOCKS = (0, 1, 3, 3)  # at each; TAESD has 1, 3, 3, 3
TAESD_BLOCKS = (1, 3, 3, 3)
LATENT_NOISE = 0.05  # added while training: neighbouring latents then decode alike, which a diffusion model needs


class Clamp(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        return 3 * torch.tanh(latents / 3)


class Block(nn.Module):
    """Three convolutions and a way around them; while training, each is followed by a batch norm (see `fold`)."""

    def __init__(self, width: int, normed: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            norm = [nn.BatchNorm2d(width)] if normed else []
            layers += [nn.Conv2d(width, width, 3, padding=1), *norm, nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.conv(hidden) + hidden)


def _blocks(level: int, normed: bool) -> list[nn.Module]:
    """TAESD's blocks of a level; those that are left out do what a block of zeros does."""
    left_out = TAESD_BLOCKS[level] - BLOCKS[level]
    return [Block(WIDTHS[level], normed) for _ in range(BLOCKS[level])] + [nn.ReLU() for _ in range(left_out)]


class Autoencoder(nn.Module):
    """Pictures in 0-1; latents as the UNet sees them."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        encoder = [nn.Conv2d(3, WIDTHS[0], 3, padding=1), *_blocks(0, normed)]
        for level, (inner, outer) in enumerate(pairwise(WIDTHS), start=1):
            encoder += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), *_blocks(level, normed)]
        self.taesd_encoder = nn.Sequential(*encoder, nn.Conv2d(WIDTHS[-1], 4, 3, padding=1))
        decoder = [Clamp(), nn.Conv2d(4, WIDTHS[-1], 3, padding=1), nn.ReLU()]
        for level in (3, 2, 1):
            convolution = nn.Conv2d(WIDTHS[level], WIDTHS[level - 1], 3, padding=1, bias=False)
            decoder += [*_blocks(level, normed), nn.Upsample(scale_factor=2), convolution]
        self.taesd_decoder = nn.Sequential(*decoder, *_blocks(0, normed), nn.Conv2d(WIDTHS[0], 3, 3, padding=1))

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, 64, 64] in 0-1 -> [B, 4, 8, 8]."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, 8, 8] -> [B, 3, 64, 64], about 0-1."""
        return self.taesd_decoder(latents)


@torch.no_grad()
def initialise(model: Autoencoder) -> None:
    """Begin with signals that keep their size through every layer, and blocks that change them little."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block):
            nn.init.constant_(module.conv[-1].weight, 0.3)  # its last batch norm
    for last in (model.taesd_encoder[-1], model.taesd_decoder[-1]):
        last.weight.mul_(0.3)
    nn.init.constant_(model.taesd_decoder[-1].bias, 0.5)  # mid-grey


@torch.no_grad()
def fold(trained: Autoencoder) -> Autoencoder:
    """The same autoencoder with each batch norm drawn into the convolution before it, as TAESD has none."""
    plain, modules = Autoencoder(), list(trained.modules())
    convolutions = [number for number, module in enumerate(modules) if isinstance(module, nn.Conv2d)]
    targets = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    for target, number in zip(targets, convolutions, strict=True):
        target.load_state_dict(modules[number].state_dict())
        norm = modules[number + 1] if number + 1 < len(modules) else None
        if isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            target.weight.mul_(scale.view(-1, 1, 1, 1))
            target.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
    return plain.to(memory_format=torch.channels_last).eval()


def autoencoder_loss(model: Autoencoder, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """How far the pictures come back from themselves and the latents are from unit variance; and the former alone."""
    latents = model.encode(pictures)
    difference = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)) - pictures
    weighed = 2 * difference - difference.mean(dim=1, keepdim=True)  # hues count twice as much as brightness
    error = weighed.abs().mean() + 2 * weighed.square().mean()
    slopes = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    spread = latents.mean(dim=(0, 2, 3)).square().mean() + (latents.std(dim=(0, 2, 3)) - 1).square().mean()
    return error + 0.3 * slopes + 0.05 * spread, difference.detach().square().mean()


@dataclass
class AutoencoderConfig:
    """Attributes:
    steps: of encoder and decoder together, after which the latents stay as they are; decoder_steps: of the decoder
        alone, while a text-to-image model can already be trained.
    init: go on from the weights that come with the project, whose batch norms are drawn in; take a tenth of the rate.
    batch: of squares of 32 pixels; in the last fifth of the steps, of a quarter as many whole pictures.
    """

    steps: int = 10_500
    decoder_steps: int = 6000
    batch: int = 16
    init: bool = False
    rate: float = 3e-3
    pictures: int = 30_000
    seed: int = 0
    folder: Path = Path("runs/miniature")


def run(config: AutoencoderConfig) -> None:
    torch.manual_seed(config.seed)
    data = pictures(config.pictures, config.seed, config.folder / "pictures")
    model = Autoencoder(normed=not config.init).to(memory_format=torch.channels_last)
    if config.init:
        model.load_state_dict(read("autoencoder"))
    else:
        initialise(model)
    total = config.steps

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = np.random.default_rng([config.seed, step])
        size = config.batch if step < 0.8 * total else config.batch // 4
        batch = data.batch(generator.integers(len(data.factors), size=size))
        if size == config.batch:
            top, left = generator.integers(5, size=2) * 8
            batch = batch[:, :, top : top + 32, left : left + 32]
        loss, error = autoencoder_loss(model, batch)
        return loss, {"mse": error.item()}

    about = {"pictures_sha256": data.sha256, "settings": json.dumps(asdict(config), default=str)}
    folder = config.folder / "autoencoder"
    model = fit(model.train(), loss_of, Fit(config.steps, config.rate, average=0.999, save_every=500), folder / "both")
    save(fold(model), "autoencoder", about)
    total = config.decoder_steps
    model.taesd_decoder.train()
    model.taesd_encoder.requires_grad_(False)
    model = fit(
        model, loss_of, Fit(config.decoder_steps, config.rate / 2, average=0.999, save_every=500), folder / "decoder"
    )
    path = save(fold(model), "autoencoder", about)
    test = pictures(500, 1, config.folder / "pictures", held_out=True)
    with torch.inference_mode():
        batch = test.batch(np.arange(500))
        coder = load()
        error = (coder.decode(coder.encode(batch)).clamp(0, 1) - batch).square().mean(dim=(1, 2, 3))
    print(f"{path.name}: {-10 * error.log10().mean():.1f} dB on held-out pictures")


def load() -> Autoencoder:
    """The trained autoencoder that comes with the project."""
    model = Autoencoder()
    model.load_state_dict(read("autoencoder"))
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()
