"""Pictures of the world on one sheet, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from training.miniature.world.factors import IDENTITIES, LAYOUTS, SCENES, STYLES, SUBJECTS, sample
from training.miniature.world.style import render


@dataclass
class SheetConfig:
    """One style a row: things in every layout and scene, then people."""

    out: Path = Path("output/miniature.png")
    seed: int = 0
    zoom: int = 2


def run(config: SheetConfig) -> None:
    generator = np.random.default_rng(config.seed)
    rows = []
    for row, style in enumerate(STYLES):
        things: list[dict[str, Any]] = [
            {"subject": SUBJECTS[(row + n) % 8], "layout": LAYOUTS[(2 * row + n) % 6], "scene": SCENES[(row + n) % 6]}
            for n in range(8)
        ]
        people: list[dict[str, Any]] = [{"identity": (6 * row + n) % len(IDENTITIES)} for n in range(6)]
        factors = [sample(generator, None, style=style, **known) for known in things]
        factors += [sample(generator, None, person=True, style=style, **known) for known in people]
        rows.append(np.concatenate([render(one) for one in factors], axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * config.zoom, sheet.height * config.zoom), Image.Resampling.NEAREST).save(config.out)
    print(f"{config.out}: {len(STYLES)} styles by 14 pictures")
