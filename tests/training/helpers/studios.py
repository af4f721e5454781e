"""A folder to train in: beside its ``base``, an image tower, data and their features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipadapter_instruct_core.tasks import Task
from shards_of_photographs import save_shards
from tiny_base import save_open_clip


def furnish(folder: Path, tasks: Sequence[Task]) -> None:
    """Make ``clip`` and ``data/TASK``."""
    save_open_clip(folder / "clip")
    for task in tasks:
        save_shards(folder / "data" / task.value, task)


def encode(folder: Path, tasks: Sequence[Task]) -> Path:
    """Make ``features`` of the data by ``base`` and ``clip``."""
    from training.features.encode import EncodeConfig, run

    run(
        EncodeConfig(
            data=[folder / "data" / task.value for task in tasks],
            out=folder / "features",
            base=folder / "base",
            image_encoder=folder / "clip",
            resolution=64,
            precision="fp32",
            device="cpu",
        )
    )
    return folder / "features"
