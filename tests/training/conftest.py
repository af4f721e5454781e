"""Fixtures of training's tests: tiny frozen models, shards of real photographs, their features."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ipadapter_instruct_core.tasks import Task

sys.path.append(str(Path(__file__).parent / "helpers"))

from studios import encode, furnish  # noqa: E402
from tiny_base import save_sd15  # noqa: E402
from tools.tiny.diffusers_models import save_ip_adapter_plus  # noqa: E402

TASKS = (Task.EVERYTHING, Task.STYLE, Task.OBJECT)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``clip``, ``data/TASK``, and ``start.safetensors``, an IPAdapter+ for that base."""
    folder = tmp_path_factory.mktemp("workshop")
    save_sd15(folder / "base")
    furnish(folder, TASKS)
    save_ip_adapter_plus(folder / "start.safetensors", folder / "base")
    return folder


@pytest.fixture(scope="session")
def features(workshop: Path) -> Path:
    """Features of the workshop's data."""
    return encode(workshop, TASKS)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped miniature as `train` reads it, ``features`` of 40 pictures, eight a task, too."""
    from training.features import encode
    from training.instructions import load_bank
    from training.miniature.expand import write
    from training.miniature.world import samples

    folder = tmp_path_factory.mktemp("small-world")
    write.run(write.ExpandConfig(folder, training=True))
    samples.run(samples.BuildConfig(out=folder / "data", count=40, validation=20))
    clip = folder / "open_clip" / "miniature-clip.safetensors"
    models = {"base": folder / "diffusers", "image_encoder": clip, "instruction_encoder": str(clip)}
    more = {"resolution": 64, "precision": "fp32", "device": "cpu", "batch_size": 100}
    with pytest.MonkeyPatch.context() as patch:  # all of the bank would take a minute
        patch.setattr(encode, "load_bank", lambda: {task: phrases[:4] for task, phrases in load_bank().items()})
        encode.run(encode.EncodeConfig(data=[folder / "data"], out=folder / "features", **models, **more))
    return folder
