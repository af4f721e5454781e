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

# Widths of the layers at 64, 32, 16 and 8 pixels; the decoder has the textures to know.
ENCODER_WIDTHS = (16, 16, 32, 64)
DECODER_WIDTHS = (16, 32, 48, 64)
LATENT_NOISE = 0.1  # added while training: neighbouring latents then decode alike, which a diffusion model needs


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


def _blocks(width: int, normed: bool) -> list[nn.Module]:
    return [Block(width, normed) for _ in range(3)]


class Autoencoder(nn.Module):
    """Pictures in 0-1; latents as the UNet sees them."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        first, last = ENCODER_WIDTHS[0], ENCODER_WIDTHS[-1]
        encoder = [nn.Conv2d(3, first, 3, padding=1), Block(first, normed)]
        for inner, outer in pairwise(ENCODER_WIDTHS):
            encoder += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), *_blocks(outer, normed)]
        self.taesd_encoder = nn.Sequential(*encoder, nn.Conv2d(last, 4, 3, padding=1))
        first, last = DECODER_WIDTHS[0], DECODER_WIDTHS[-1]
        decoder = [Clamp(), nn.Conv2d(4, last, 3, padding=1), nn.ReLU()]
        for inner, outer in pairwise(reversed(DECODER_WIDTHS)):
            convolution = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
            decoder += [*_blocks(inner, normed), nn.Upsample(scale_factor=2), convolution]
        self.taesd_decoder = nn.Sequential(*decoder, Block(first, normed), nn.Conv2d(first, 3, 3, padding=1))

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
    error = difference.abs().mean() + 2 * difference.square().mean()
    slopes = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    spread = latents.mean(dim=(0, 2, 3)).square().mean() + (latents.std(dim=(0, 2, 3)) - 1).square().mean()
    return error + 0.5 * slopes + 0.05 * spread, difference.detach().square().mean()


@dataclass
class AutoencoderConfig:
    """Train the autoencoder on drawn pictures."""

    steps: int = 3600
    batch: int = 8
    rate: float = 3e-3
    pictures: int = 30_000
    seed: int = 0
    folder: Path = Path("runs/miniature")


def run(config: AutoencoderConfig) -> None:
    torch.manual_seed(config.seed)
    data = pictures(config.pictures, config.seed, config.folder / "pictures")
    model = Autoencoder(normed=True).to(memory_format=torch.channels_last)
    initialise(model)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = np.random.default_rng([config.seed, step])
        loss, error = autoencoder_loss(model, data.batch(generator.integers(len(data.factors), size=config.batch)))
        return loss, {"mse": error.item()}

    model = fit(model, loss_of, Fit(config.steps, config.rate), config.folder / "autoencoder")
    path = save(
        model, "autoencoder", {"pictures_sha256": data.sha256, "settings": json.dumps(asdict(config), default=str)}
    )
    test = pictures(500, 1, config.folder / "pictures", held_out=True)
    with torch.inference_mode():
        batch = test.batch(np.arange(500))
        error = (load().decode(model.encode(batch)).clamp(0, 1) - batch).square().mean(dim=(1, 2, 3))
    print(f"{path.name}: {-10 * error.log10().mean():.1f} dB on held-out pictures")


def load() -> Autoencoder:
    """The trained autoencoder that comes with the project."""
    model = Autoencoder()
    model.load_state_dict(read("autoencoder"))
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()
