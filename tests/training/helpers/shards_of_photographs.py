"""Shards of samples from real photographs, as `build` writes them, in no time."""

from __future__ import annotations

from pathlib import Path

from ipadapter_instruct_core.tasks import Task
from PIL import Image
from skimage import data
from training.datasets.sample import Sample, encode_picture
from training.datasets.shards import MANIFEST, write_shard
from training.files import sha256, write_json

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def photograph(name: str, side: int = 96, turned: int = 0) -> Image.Image:
    """One of scikit-image's own photographs, cut square."""
    from PIL import ImageOps

    picture = ImageOps.fit(Image.fromarray(getattr(data, name)()), (side, side))
    return picture.rotate(90 * turned)


def save_shards(
    folder: Path, task: Task, count: int = 8, validation: int = 2, per_shard: int = 4, seed: int = 0
) -> Path:
    """A dataset folder of one task: photographs as targets, turned ones as conditions."""
    folder.mkdir(parents=True)
    shards = []
    for split, number in (("train", count), ("validation", validation)):
        samples = [_sample(task, split, n, seed) for n in range(number)]
        for start in range(0, number, per_shard):
            path = folder / f"{split}-{start // per_shard:05d}.tar"
            part = samples[start : start + per_shard]
            written = write_shard(path, [(f"{start + n:09d}", sample.members()) for n, sample in enumerate(part)])
            shards.append({"name": path.name, "samples": written, "sha256": sha256(path)})
    write_json(folder / MANIFEST, {"task": task.value, "shards": shards})
    return folder


def _sample(task: Task, split: str, number: int, seed: int) -> Sample:
    name = PHOTOGRAPHS[(number + seed) % len(PHOTOGRAPHS)]
    target = encode_picture(photograph(name))
    condition = target if task is Task.EVERYTHING else encode_picture(photograph(name, turned=1 + number // 4 % 3))
    return Sample(
        condition=condition,
        target=None if task is Task.EVERYTHING else target,
        prompt=f"a photograph of {name}, number {number}",
        task=task,
        source_id=f"{split}-{number}",
        group=f"{split}-{number}",
        subject=name if task is Task.OBJECT else "",
        condition_prompt=name,
    )
