"""Weights and inputs that parity/README.md tells how to rebuild, and the outputs to hold ours against.

The folder is the one that the environment variable PARITY_DIR names, else the project's own.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(os.environ.get("PARITY_DIR") or Path(__file__).with_name("parity"))


@dataclass(frozen=True)
class ReferenceVectors:
    """One file: the expected tensors, and its metadata."""

    name: str
    expected: dict[str, Tensor]
    metadata: dict[str, str]

    def value(self, key: str) -> Any:
        """A number, list or dictionary of the metadata."""
        return json.loads(self.metadata[key])

    @property
    def inputs(self) -> dict[str, Tensor]:
        salt = self.metadata["salt"]
        return {name: _normal(f"{salt}:input:{name}", shape) for name, shape in self.value("inputs").items()}

    def weights(self, keys: str = "keys", salt: str = "salt") -> dict[str, Tensor]:
        """The state dict whose key → shape table is in the metadata under `keys`."""
        return rebuild_weights(self.metadata[salt], self.value(keys))


def read_reference_vectors(name: str) -> ReferenceVectors:
    """Read `name`.safetensors; a missing file is an error, never a skip."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        names = file.keys()
        return ReferenceVectors(name, {key: file.get_tensor(key) for key in names}, file.metadata())


def names(pattern: str, *known: str) -> list[str]:
    """Files that must be there, and whatever others the folder holds that fit the pattern."""
    return [*known, *sorted({path.stem for path in FOLDER.glob(f"{pattern}.safetensors")} - set(known))]


def rebuild_weights(salt: str, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a {key: shape} table, each drawn from a generator that its key and the salt seed."""
    return {key: _weight(salt, key, list(shape)) for key, shape in shapes.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference ÷ largest absolute expected value; NaN where the shapes or values are no match."""
    if actual.shape != expected.shape:
        return math.nan
    return float((actual - expected).abs().max() / expected.abs().max())


def _weight(salt: str, key: str, shape: list[int]) -> Tensor:
    r = _normal(f"{salt}:{key}", shape)
    if len(shape) <= 1:
        return 1 + 0.1 * r if len(shape) == 1 and key.endswith("weight") else 0.1 * r
    return r / (math.sqrt(shape[-1]) if key.endswith("latents") else math.sqrt(r[0].numel()))


def _normal(seed: str, shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))
