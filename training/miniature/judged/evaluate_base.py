"""How often the text-to-image model paints what its caption says, by the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from training.miniature.models import autoencoder, base, oracle
from training.miniature.models.fit import channels_last
from training.miniature.world.captions import caption
from training.miniature.world.factors import sample


@dataclass
class EvaluateBaseConfig:
    """Attributes:
    count: captions in all, a third of them of people; state: a training state in place of the shipped weights.
    """

    count: int = 300
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    held_out: bool = True
    state: Path | None = None
    sheet: Path | None = None


def run(config: EvaluateBaseConfig) -> None:
    generator = np.random.default_rng(config.seed)
    factors = [sample(generator, config.held_out, person=n % 3 == 0) for n in range(config.count)]
    texts = [caption(one, generator) for one in factors]
    if config.state is None:
        model = base.load()
    else:
        model = channels_last(base.TextToImage()).eval()
        model.load_state_dict(torch.load(config.state, weights_only=True)["average"])
    decoder, images = autoencoder.load(), []
    for first in range(0, config.count, 100):
        part = texts[first : first + 100]
        images.append(decoder.decode(base.paint(model, part, config.seed + first, config.steps, config.guidance)))
    pictures = torch.cat(images).clamp(0, 1)
    scores = oracle.accuracy(oracle.judge(oracle.load(), pictures), oracle.labels(factors))
    print("  ".join(f"{factor} {score:.3f}" for factor, score in scores.items()))
    if config.sheet is not None:
        rows = (pictures[:84] * 255).byte().permute(0, 2, 3, 1).reshape(-1, 14, 64, 64, 3)
        sheet = Image.fromarray(rows.transpose(1, 2).reshape(-1, 14 * 64, 3).numpy())
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(config.sheet)
