"""The weights that come with the project: safetensors in half precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "weights"


def save(model: nn.Module | Mapping[str, Tensor], name: str, metadata: Mapping[str, str] = {}) -> Path:
    """Write a model's weights as ``weights/NAME.safetensors``; floats are halved, other tensors kept."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    save_file({key: tensor.contiguous().cpu() for key, tensor in halved.items()}, path, dict(metadata))
    return path


def made_by(config: Any, pictures_sha256: str) -> dict[str, str]:
    """What a file of weights says of itself: the settings of its run, a dataclass, and the hash of its pictures."""
    return {"pictures_sha256": pictures_sha256, "settings": json.dumps(asdict(config), default=str)}


def read(name: str) -> dict[str, Tensor]:
    """The weights of ``weights/NAME.safetensors`` in single precision.

    Raises:
        FileNotFoundError: they have not been made yet.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"There is no {path.name}; training/miniature/README.md says how it is made.")
    state = load_file(path)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
