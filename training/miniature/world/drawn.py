"""Many pictures of the world at once, kept on disk between runs, with what they show."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from training.miniature.world.factors import Factors, sample
from training.miniature.world.style import render

PERSON_SHARE = 0.35
SIDES = {False: "training", True: "held-out", None: "any"}


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    pixels: [N, 64, 64, 3] uint8.
    factors: of each.
    name: tells them from others in a folder.
    """

    pixels: np.ndarray
    factors: list[Factors]
    name: str

    def bytes(self, indices: np.ndarray) -> Tensor:
        """[B, 64, 64, 3] uint8."""
        return torch.from_numpy(np.asarray(self.pixels[indices]))

    def batch(self, indices: np.ndarray) -> Tensor:
        """[B, 3, 64, 64] in 0-1."""
        return to_tensor(self.bytes(indices))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.pixels).data).hexdigest()


def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in 0-1, channels last in memory."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float().div_(255)


def in_processes(work: Callable[[Any], Any], items: Sequence[Any], what: str, chunk: int = 64) -> list[Any]:
    """``work`` of each item, in order, on all processors."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        return list(tqdm(pool.map(work, items, chunksize=chunk), desc=what, total=len(items), mininterval=5))


def _drawn(seed: int, held_out: bool | None, number: int) -> tuple[np.ndarray, Factors]:
    generator = np.random.default_rng([seed, list(SIDES).index(held_out), number])
    factors = sample(generator, held_out, person=generator.random() < PERSON_SHARE)
    return render(factors), factors


@cache
def _drawing() -> str:
    """Of the code that draws: pictures of an earlier one are not taken for its own."""
    code = (
        Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("factors", "regions", "draw", "faces", "style")
    )
    return hashlib.sha256(b"".join(code)).hexdigest()[:8]


def pictures(count: int, seed: int, folder: Path, held_out: bool | None = False) -> Pictures:
    """Draw ``count`` pictures, or read them where an earlier run has drawn them.

    Args:
        held_out: False for combinations of the training set, True for the others, None for any.
    """
    stem = f"{SIDES[held_out]}-{seed}-{count}-{_drawing()}"
    kept, words = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not (kept.exists() and words.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = in_processes(partial(_drawn, seed, held_out), range(count), "drawing")
        np.save(kept, np.stack([picture for picture, _ in drawn]))
        words.write_text(json.dumps([asdict(one) for _, one in drawn]), encoding="utf-8")
    return Pictures(
        np.load(kept, mmap_mode="r"), [Factors(**one) for one in json.loads(words.read_text(encoding="utf-8"))], stem
    )
