"""The weights that come with the project: eight bits a weight and a scale a channel, in compressed safetensors.

What has one dimension or is small (norms, biases) is kept in half precision. `judged.rounding` says what that costs.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ipadapter_instruct_core import checkpoint
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from training.files import sha256, write_atomically
from tyro.conf import Positional

FOLDER = Path(__file__).parents[1] / "weights"
LARGEST = 127  # of eight bits with a sign
SMALL = 1024  # with fewer weights than this a tensor is not worth rounding
SCALE = ".scale"  # ends the name of a rounded tensor's scales


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.safetensors.gz"


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each large tensor KEY [C, ...] as int8, and KEY.scale [C] in single precision; other floats in half."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        assert tensor.dtype != torch.int8 and not key.endswith(SCALE), f"{key} would be taken for a rounded one"
        if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() >= SMALL:
            channels = tensor.detach().float().flatten(1)
            scale = channels.abs().amax(dim=1) / LARGEST
            whole = (channels / scale.clamp(min=torch.finfo().tiny)[:, None]).round().to(torch.int8)
            result |= {key: whole.view(tensor.shape), key + SCALE: scale}
        else:
            result[key] = tensor.half() if tensor.is_floating_point() else tensor
    return result


def expanded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`rounded` undone, in single precision."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if tensor.dtype == torch.int8:
            result[key] = tensor * state[key + SCALE].view(-1, *[1] * (tensor.ndim - 1))
        elif not key.endswith(SCALE):
            result[key] = tensor.float() if tensor.is_floating_point() else tensor
    return result


def save(model: nn.Module | Mapping[str, Tensor], name: str, metadata: Mapping[str, str] = {}) -> Path:
    """Write a model's weights as ``weights/NAME.safetensors.gz``, whole or not at all, alike for alike weights."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.safetensors"
        checkpoint.write(plain, rounded(state), metadata)
        write_atomically(path_of(name), gzip.compress(plain.read_bytes(), mtime=0))
    return path_of(name)


def made_by(config: Any, pictures_sha256: str) -> dict[str, str]:
    """What a file of weights says of itself: the settings of its run, a dataclass, and the hash of its pictures."""
    return {"pictures_sha256": pictures_sha256, "settings": json.dumps(asdict(config), default=str)}


def read(name: str) -> dict[str, Tensor]:
    """The weights of ``weights/NAME.safetensors.gz`` in single precision.

    Raises:
        FileNotFoundError: they have not been made yet.
        ValueError: the file is damaged.
    """
    try:
        return expanded(load(_content(name)))
    except (SafetensorError, KeyError):
        raise ValueError(_damaged(name)) from None


def about(name: str) -> dict[str, str]:
    """The metadata of ``weights/NAME.safetensors.gz``; raises what `read` raises."""
    content = _content(name)
    try:
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except ValueError:
        raise ValueError(_damaged(name)) from None


def _content(name: str) -> bytes:
    path = path_of(name)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path.name}; training/miniature/README.md says how it is made.")
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        raise ValueError(_damaged(name)) from None


def _damaged(name: str) -> str:
    return f"{path_of(name)} is cut short or damaged; take it from the repository again."


@dataclass
class KeepConfig:
    """Attributes:
    files: weights as safetensors, of which each takes the place of the shipped ones of its name.
    """

    files: Positional[tuple[Path, ...]]


def run(config: KeepConfig) -> None:
    """Round weights that were made elsewhere; they go on saying what they said of themselves, and what they were."""
    for file in config.files:
        state, metadata = checkpoint.read(file)
        print(save(state, file.stem, {**metadata, "rounded_from_sha256": sha256(file)}))
