"""What tests of `encode` share: its settings here, and what the models themselves make of pictures and words."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from ipadapter_instruct_core.tasks import Task
from safetensors.torch import load_file
from tiny_base import OPEN_CLIP
from torch import Tensor
from training.datasets.index import Shards
from training.datasets.shards import Tally
from training.features.encode import EncodeConfig
from training.instructions import KEYWORDS

TASK = Task.OBJECT
SMALL_BANK = {task: [f"{task.value} {n}" for n in range(3)] for task in KEYWORDS}


def settings(workshop: Path, out: Path, *tasks: Task, **changes: object) -> EncodeConfig:
    values = {
        "data": [workshop / "data" / task.value for task in tasks or (TASK,)],
        "base": workshop / "base",
        "image_encoder": workshop / "clip",
        "resolution": 64,
        "precision": "fp32",
        "device": "cpu",
        "out": out,
    }
    return EncodeConfig(**values | changes)


def samples_of(folder: Path, split: str) -> list[dict[str, bytes]]:
    paths = sorted(folder.glob(f"{split}-*.tar"))
    shards = Shards(paths, Tally(0.0))
    return [shards[index] for index in range(len(shards))]


def of_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for ``tolerance`` of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


def open_clip_model(folder: Path) -> torch.nn.Module:
    from open_clip import CLIP

    model = CLIP(**OPEN_CLIP).eval()
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return model


@cache
def text_encoder(folder: Path) -> tuple[object, torch.nn.Module]:
    from transformers import CLIPTextModel, CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), CLIPTextModel.from_pretrained(folder / "text_encoder")


def text_states(workshop: Path, text: str) -> Tensor:
    """[77, 32]: the last states after the final norm."""
    tokenizer, model = text_encoder(workshop / "base")
    tokens = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(tokens.input_ids)[0][0]
