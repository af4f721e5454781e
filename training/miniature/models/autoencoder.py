"""A TAESD: 64x64 pictures <-> 4x8x8 latents of about unit variance. The layers stand where ComfyUI has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from training.miniature.models.fit import Fit, best_device, channels_last, fit
from training.miniature.models.weights import made_by, read, save
from training.miniature.world.drawn import pictures, to_tensor
from training.miniature.world.factors import PERSON

WIDTH = 64
BLOCKS = (1, 3, 3, 3)  # at 64, 32, 16 and 8 pixels
FACE, FACE_WEIGHT = slice(14, 52), 4.0  # where most of a portrait's features lie, and how much a mistake there counts
LATENT_NOISE = 0.05  # added while training: neighbouring latents then decode alike, which a diffusion model needs


class Clamp(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        return 3 * torch.tanh(latents / 3)


class Block(nn.Module):
    """Three convolutions and a way around them; while training, each is followed by a batch norm (see `fold`)."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            norm = [nn.BatchNorm2d(WIDTH)] if normed else []
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), *norm, nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.conv(hidden) + hidden)


class Autoencoder(nn.Module):
    """Pictures in 0-1; latents as the UNet sees them."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        encoder: list[nn.Module] = []
        for level, count in enumerate(BLOCKS):
            entry = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)
            encoder.append(entry if level else nn.Conv2d(3, WIDTH, 3, padding=1))
            encoder += [Block(normed) for _ in range(count)]
        self.taesd_encoder = nn.Sequential(*encoder, nn.Conv2d(WIDTH, 4, 3, padding=1))
        decoder: list[nn.Module] = [Clamp(), nn.Conv2d(4, WIDTH, 3, padding=1), nn.ReLU()]
        for count in BLOCKS[:0:-1]:
            enlarged = (nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False))
            decoder += [*(Block(normed) for _ in range(count)), *enlarged]
        self.taesd_decoder = nn.Sequential(*decoder, Block(normed), nn.Conv2d(WIDTH, 3, 3, padding=1))

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
            last_norm: Any = module.conv[-1]
            nn.init.constant_(last_norm.weight, 0.3)
    ends: list[Any] = [model.taesd_encoder[-1], model.taesd_decoder[-1]]
    for last in ends:
        last.weight.mul_(0.3)
    nn.init.constant_(ends[-1].bias, 0.5)  # mid-grey


@torch.no_grad()
def fold(trained: Autoencoder) -> Autoencoder:
    """The same autoencoder with each batch norm drawn into the convolution before it, as TAESD has none."""
    plain = Autoencoder().to(next(trained.parameters()).device)
    modules = list(trained.modules())
    convolutions = [number for number, module in enumerate(modules) if isinstance(module, nn.Conv2d)]
    targets = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    for target, number in zip(targets, convolutions, strict=True):
        target.load_state_dict(modules[number].state_dict())
        norm = modules[number + 1] if number + 1 < len(modules) else None
        if isinstance(norm, nn.BatchNorm2d) and target.bias is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            target.weight.mul_(scale.view(-1, 1, 1, 1))
            target.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
    return channels_last(plain).eval()


def autoencoder_loss(model: Autoencoder, pictures: Tensor, portraits: int = 0) -> tuple[Tensor, Tensor]:
    """How far the pictures come back from themselves and the latents are from unit variance; and the former alone.

    Args:
        portraits: how many of the pictures, the first ones, show a person: their faces count more.
    """
    latents = model.encode(pictures).float()
    difference = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).float() - pictures
    counts = torch.ones_like(pictures[:, :1])
    counts[:portraits, :, FACE, FACE] = FACE_WEIGHT
    weighed = 2 * difference - difference.mean(dim=1, keepdim=True)  # hues count twice as much as brightness
    error = (counts * (weighed.abs() + 2 * weighed.square())).mean()
    down, right = (counts[:, :, 1:] * difference.diff(dim=2)), (counts[..., 1:] * difference.diff(dim=3))
    slopes = down.abs().mean() + right.abs().mean()
    spread = latents.mean(dim=(0, 2, 3)).square().mean() + (latents.std(dim=(0, 2, 3)) - 1).square().mean()
    return error + 0.3 * slopes + 0.05 * spread, difference.detach().square().mean()


@dataclass
class AutoencoderConfig:
    """Attributes:
    steps: of encoder and decoder together, after which the latents stay as they are; decoder_steps: of the decoder
        alone, while a text-to-image model can already be trained.
    people_share: of a batch, 0-1; more than of the world, since what tells faces apart is small.
    init: go on from the weights that come with the project, whose batch norms are drawn in; take a tenth of the rate.
    """

    steps: int = 8000
    decoder_steps: int = 4000
    batch: int = 96
    people_share: float = 0.6
    init: bool = False
    rate: float = 2e-3
    pictures: int = 30_000
    seed: int = 0
    device: str = field(default_factory=best_device)
    workers: int = 4
    folder: Path = Path("runs/miniature")


def run(config: AutoencoderConfig) -> None:
    torch.manual_seed(config.seed)
    data = pictures(config.pictures, config.seed, config.folder / "pictures", held_out=None)
    model = channels_last(Autoencoder(normed=not config.init))
    if config.init:
        model.load_state_dict(read("autoencoder"))
    else:
        initialise(model)
    model.to(config.device)

    person = np.array([one.subject == PERSON for one in data.factors])
    persons, things = np.flatnonzero(person), np.flatnonzero(~person)
    portraits = round(config.people_share * config.batch)

    def draw(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([config.seed, step])
        chosen = [generator.choice(persons, portraits), generator.choice(things, config.batch - portraits)]
        return {"pixels": data.bytes(np.concatenate(chosen))}

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, error = autoencoder_loss(model, to_tensor(batch["pixels"]), portraits)
        return loss, {"mse": error}

    def train(steps: int, rate: float, part: str) -> None:
        settings = Fit(steps, rate, average=0.999, save_every=500)
        fit(model.train(), draw, loss_of, settings, config.folder / "autoencoder" / part, config.device, config.workers)

    about = made_by(config, data.sha256)
    train(config.steps, config.rate, "both")
    save(fold(model), "autoencoder", about)
    # The encoder's norms, too, stay as they are: they are drawn into the convolutions first.
    model.taesd_encoder = fold(model).taesd_encoder.to(config.device).requires_grad_(False)
    train(config.decoder_steps, config.rate / 2, "decoder")
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
    return channels_last(model).requires_grad_(False).eval()
