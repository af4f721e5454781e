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
    from encoded import settings
    from training.features.encode import run

    run(settings(folder, folder / "features", *tasks))
    return folder / "features"
