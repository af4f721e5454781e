"""Many pictures of the world at once, kept on disk between runs, with what they show."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from training.miniature.factors import Factors, sample
from training.miniature.style import render

PERSON_SHARE = 0.35


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    pixels: [N, 64, 64, 3] uint8.
    factors: of each.
    """

    pixels: np.ndarray
    factors: list[Factors]

    def batch(self, indices: np.ndarray) -> Tensor:
        """[B, 3, 64, 64] in 0-1."""
        return to_tensor(np.asarray(self.pixels[indices]))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).hexdigest()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in 0-1, channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)


def pictures(count: int, seed: int, folder: Path, held_out: bool = False) -> Pictures:
    """Draw ``count`` pictures, or read them where an earlier run has drawn them."""
    stem = f"{'held-out' if held_out else 'training'}-{seed}-{count}"
    kept, words = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not (kept.exists() and words.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng([seed, held_out])
        factors = [sample(generator, held_out, person=generator.random() < PERSON_SHARE) for _ in range(count)]
        np.save(kept, np.stack([render(one) for one in tqdm(factors, desc="drawing", mininterval=5)]))
        words.write_text(json.dumps([asdict(one) for one in factors]))
    return Pictures(np.load(kept, mmap_mode="r"), [Factors(**one) for one in json.loads(words.read_text())])
