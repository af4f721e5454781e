"""Fixtures of training's tests: tiny frozen models, shards of real photographs, their features."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import save
from ipadapter_instruct_core.config import AdapterConfig, Base
from ipadapter_instruct_core.tasks import Task

sys.path.append(str(Path(__file__).parent))  # tiny_base.py, shards_of_photographs.py, sources.py

from shards_of_photographs import save_shards  # noqa: E402
from tiny_base import OPEN_CLIP, WIDTH, save_open_clip, save_sd15  # noqa: E402

TASKS = (Task.EVERYTHING, Task.STYLE, Task.OBJECT)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``clip``, ``data/TASK``, and ``start.safetensors``, an IPAdapter+ for that base."""
    folder = tmp_path_factory.mktemp("workshop")
    save_sd15(folder / "base")
    save_open_clip(folder / "clip")
    for task in TASKS:
        save_shards(folder / "data" / task.value, task)
    torch.manual_seed(2)
    save(folder / "start.safetensors", Adapter(small_adapter(folder / "base")))
    return folder


@pytest.fixture(scope="session")
def features(workshop: Path) -> Path:
    """Features of the workshop's data."""
    from training.encode import EncodeConfig, run

    run(EncodeConfig(**encode_settings(workshop), out=workshop / "features"))
    return workshop / "features"


def encode_settings(workshop: Path) -> dict[str, object]:
    return {
        "data": [workshop / "data" / task.value for task in TASKS],
        "base": workshop / "base",
        "image_encoder": workshop / "clip",
        "resolution": 64,
        "precision": "fp32",
        "device": "cpu",
    }


def small_adapter(base: Path) -> AdapterConfig:
    """A plain IPAdapter+ in a few thousand weights that fits a tiny base."""
    from training.base import load_base
    from training.conditioned_unet import cross_attentions

    return AdapterConfig(
        image_width=OPEN_CLIP["vision_cfg"]["width"],
        width=64,
        heads=1,
        depth=2,
        token_count=4,
        output_width=WIDTH,
        instruction_width=None,
        prompt_width=None,
        layers=tuple(cross_attentions(load_base(base).unet)),
        base=Base.SD15,
    )
