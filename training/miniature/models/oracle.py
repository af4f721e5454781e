"""Says what a picture shows: one classifier for each factor, on a shared trunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from tqdm import tqdm
from training.miniature.models.fit import Fit, best_device, channels_last, fit
from training.miniature.models.weights import made_by, read, save
from training.miniature.world.drawn import Pictures, pictures, to_tensor
from training.miniature.world.factors import (
    COLOURS,
    EXPRESSIONS,
    IDENTITIES,
    LAYOUTS,
    PERSON,
    PORTRAIT,
    SCENES,
    STYLES,
    SUBJECTS,
    Factors,
)

CLASSES: dict[str, tuple[str, ...]] = {
    "subject": (*SUBJECTS, PERSON),
    "style": STYLES,
    "layout": (*LAYOUTS, PORTRAIT),
    "scene": SCENES,
    "colour": COLOURS,
    "identity": tuple(str(number) for number in range(len(IDENTITIES))),
    "expression": EXPRESSIONS,
}
COLOURLESS = ("pencil", "blueprint", "woodcut")  # styles that do not show a subject's own colour
UNKNOWN = -100  # what a picture does not show: a thing's expression


class Oracle(nn.Module):
    """[B, 3, 64, 64] in 0-1 -> for each factor, [B, classes]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64, 96, 96, 128)
        layers: list[nn.Module] = []
        for number, (inner, outer) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            stride = 2 if number in (0, 1, 3, 5) else 1
            size = 5 if number == 0 else 3
            layers += [nn.Conv2d(inner, outer, size, stride, size // 2, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, 192), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(images)
        return {name: head(hidden) for name, head in self.heads.items()}


def labels(factors: Sequence[Factors]) -> dict[str, Tensor]:
    """For each factor, [B] class numbers; UNKNOWN where a picture does not show it."""

    def number(name: str, one: Factors) -> int:
        person = one.subject == PERSON
        if (name in ("identity", "expression") and not person) or (name == "colour" and one.style in COLOURLESS):
            return UNKNOWN
        return CLASSES[name].index(str(getattr(one, name)))

    return {name: torch.tensor([number(name, one) for one in factors]) for name in CLASSES}


@torch.inference_mode()
def judge(oracle: Oracle, images: Tensor, batch: int = 250) -> dict[str, Tensor]:
    """For each factor, the [B] class numbers of pictures [B, 3, 64, 64] in 0-1 (larger ones are made smaller)."""
    if images.shape[-1] != 64:
        images = interpolate(images, size=64, mode="area")
    votes = [{name: logits.argmax(dim=1) for name, logits in oracle(part).items()} for part in images.split(batch)]
    return {name: torch.cat([vote[name] for vote in votes]) for name in CLASSES}


def accuracy(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """For each factor, the share of pictures judged right among those that show it."""
    return {
        name: (found[name] == wanted[name])[wanted[name] != UNKNOWN].float().mean().item()
        for name in CLASSES
        if (wanted[name] != UNKNOWN).any()
    }


def load() -> Oracle:
    """The trained oracle that comes with the project."""
    model = Oracle()
    model.load_state_dict(read("oracle"))
    return channels_last(model).requires_grad_(False).eval()


@dataclass
class OracleConfig:
    """Train the oracle, on pictures as drawn and on pictures that went through the autoencoder.

    Attributes:
        init: go on from the weights that come with the project.
    """

    steps: int = 3000
    batch: int = 256
    rate: float = 2e-3
    pictures: int = 100_000
    round_trips: int = 30_000
    seed: int = 0
    init: bool = False
    device: str = field(default_factory=best_device)
    workers: int = 4
    folder: Path = Path("runs/miniature")


@torch.inference_mode()
def round_trips(data: Pictures, count: int, device: str) -> np.ndarray:
    """The first ``count`` pictures after the autoencoder, with a little noise on the latents: [N, 64, 64, 3] uint8."""
    from training.miniature.models import autoencoder

    model, parts = autoencoder.load().to(device), []
    for first in tqdm(range(0, count, 100), desc="through the autoencoder", mininterval=5):
        latents = model.encode(data.batch(np.arange(first, min(first + 100, count))).to(device))
        images = model.decode(latents + 0.1 * torch.randn_like(latents))
        parts.append((images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def augment(images: Tensor) -> Tensor:
    """A little blur for half of the pictures, noise and another brightness for each."""

    def each(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    blurred = avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = torch.lerp(images, blurred, each(-1, 1).clamp(min=0))
    return each(0.92, 1.08) * images + each(0, 0.08) * torch.randn_like(images)


def run(config: OracleConfig) -> None:
    torch.manual_seed(config.seed)
    # It has to judge every combination, so it learns from all of them: what is held out is for the adapters.
    data = pictures(config.pictures, config.seed, config.folder / "pictures", held_out=None)
    passed = round_trips(data, config.round_trips, config.device)
    known = torch.stack([*labels(data.factors).values()], dim=1)
    model = channels_last(Oracle())
    if config.init:
        model.load_state_dict(read("oracle"))
    model.to(config.device).train()

    def draw(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([config.seed, step])
        drawn = generator.integers(len(data.factors), size=config.batch // 2)
        sent = generator.integers(len(passed), size=config.batch // 2)
        pixels = np.concatenate([data.pixels[drawn], passed[sent]])
        return {"pixels": torch.from_numpy(pixels), "labels": known[np.concatenate([drawn, sent])]}

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        found = model(augment(to_tensor(batch["pixels"])))
        pairs = zip(found.values(), batch["labels"].unbind(dim=1), strict=True)
        parts = [cross_entropy(logits, wanted, ignore_index=UNKNOWN) for logits, wanted in pairs]
        return torch.stack(parts).sum(), {}

    settings = Fit(config.steps, config.rate)
    fit(model, draw, loss_of, settings, config.folder / "oracle", config.device, config.workers)
    save(model, "oracle", made_by(config, data.sha256))
    report(config.folder / "pictures")


def report(folder: Path) -> None:
    """Print the oracle's accuracy on held-out combinations, as drawn and after the autoencoder."""
    test, oracle = pictures(3000, 1, folder, held_out=True), load()
    rows = {"as drawn": test.pixels, "after the autoencoder": round_trips(test, len(test.factors), "cpu")}
    for name, pixels in rows.items():
        scores = accuracy(judge(oracle, to_tensor(np.asarray(pixels))), labels(test.factors))
        print(f"{name:<22}", "  ".join(f"{factor} {score:.3f}" for factor, score in scores.items()))
