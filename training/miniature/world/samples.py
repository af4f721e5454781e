"""The five tasks of the paper (Sec. 3.4) in the small world, and their shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.datasets.sample import Sample
from training.datasets.shards import MANIFEST, write_shard
from training.files import sha256, write_json
from training.miniature.world.captions import PARTS, caption
from training.miniature.world.drawn import in_processes
from training.miniature.world.factors import Factors, sample
from training.miniature.world.style import render, render_cut_out

TASKS = (Task.EVERYTHING, Task.STYLE, Task.OBJECT, Task.COMPOSITION, Task.FACE)
COLOURFUL_STYLES = ("poster", "watercolour", "neon", "glass", "dots")  # those that show a subject's own colour
# What the prompt leaves to the condition picture. Of everything it is random parts: a prompt that says all of a picture
# leaves an adapter nothing to learn.
LEFT_TO_CONDITION: dict[Task, tuple[str, ...]] = {
    Task.STYLE: ("style",),
    Task.OBJECT: ("subject",),
    Task.COMPOSITION: ("layout",),
    Task.FACE: ("identity", "layout"),
}
# Training prompts also leave out some of what the task does not take, so that it is not taken where nobody named it.
# Those of the held-out pairs name it all, for the truth to be known.
UNSAID_SHARE = 0.2


@dataclass(frozen=True)
class Pair:
    """A condition and a target with their pictures ([64, 64, 3] uint8) and what these show; see `Sample`.

    ``left_out`` names what the prompt does not say of the target, for the condition to give.
    """

    task: Task
    condition: Factors
    target: Factors
    condition_picture: np.ndarray
    prompt: str
    left_out: tuple[str, ...]
    condition_prompt: str

    @property
    def target_picture(self) -> np.ndarray:
        return self.condition_picture if self.task is Task.EVERYTHING else render(self.target)


def pair(task: Task, generator: np.random.Generator, held_out: bool = False) -> Pair:
    """A random pair of one task.

    Args:
        held_out: False: both pictures from the training set's combinations; True: the target from the others, the
            condition from all.
    """

    def condition_unlike(target: Factors, *changed: str, person: bool = False, **kept: object) -> Factors:
        while True:
            condition = sample(generator, None if held_out else False, person, **kept)
            if all(getattr(target, name) != getattr(condition, name) for name in changed):
                return condition

    person = generator.random() < {Task.FACE: 1, Task.EVERYTHING: 0.3, Task.STYLE: 0.2}.get(task, 0)
    target = sample(generator, held_out, person)
    if task is Task.FACE:
        condition = condition_unlike(target, "expression", "style", "scene", person=True, identity=target.identity)
        if generator.random() < 0.5:  # half of the conditions are zoomed in to the face (Sec. 3.4)
            condition = replace(condition, zoom=1.25)
    elif task is Task.OBJECT:
        while True:  # not every style is to be had: some never go with this subject
            condition = condition_unlike(target, "style", "scene", subject=target.subject, colour=target.colour)
            if condition.style in COLOURFUL_STYLES:
                break
    elif task is Task.COMPOSITION:
        condition = condition_unlike(target, "style", "subject", "scene", layout=target.layout)
    elif task is Task.STYLE:
        other = generator.random() < 0.2
        condition = condition_unlike(target, "subject", "scene", person=other and not person, style=target.style)
    else:
        condition = target
    red, green, blue = (int(value) for value in generator.integers(0, 256, 3))
    picture = render_cut_out(condition, (red, green, blue)) if task is Task.OBJECT else render(condition)
    left = LEFT_TO_CONDITION.get(task, ())
    if task is Task.EVERYTHING or not held_out:
        share = 0.5 if task is Task.EVERYTHING else UNSAID_SHARE
        left += tuple(part for part in PARTS if part not in left and generator.random() < share)
    prompt = caption(target, generator, left)
    condition_prompt = prompt if task is Task.EVERYTHING else caption(condition, generator)
    return Pair(task, condition, target, picture, prompt, left, condition_prompt)


def to_sample(pair: Pair, source_id: str) -> Sample:
    """The pair as other datasets give theirs, its pictures as PNG."""
    return Sample(
        condition=_png(pair.condition_picture),
        target=None if pair.task is Task.EVERYTHING else _png(pair.target_picture),
        prompt=pair.prompt,
        task=pair.task,
        source_id=source_id,
        group=source_id,
        subject=pair.condition.subject if pair.task is Task.OBJECT else "",
        condition_prompt=pair.condition_prompt,
    )


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass
class BuildConfig:
    """Shards of all five tasks in turn.

    Attributes:
        count: samples to train on; validation: samples of the factor combinations that training never sees.
    """

    out: Path = Path("runs/miniature/data")
    count: int = 100_000
    validation: int = 500
    seed: int = 0
    shard_size: int = 2_500


@dataclass(frozen=True)
class Part:
    """One shard: ``count`` samples of a split from number ``first`` on."""

    split: str
    first: int
    count: int

    def samples(self, seed: int) -> Iterator[Sample]:
        """Each depends on the seed, the split and its own number alone."""
        held_out = self.split == "validation"
        for number in range(self.first, self.first + self.count):
            generator = np.random.default_rng([seed, held_out, number])
            made = pair(TASKS[number % len(TASKS)], generator, held_out)
            yield to_sample(made, f"miniature-{self.split}-{seed}-{number:07d}")


def write_part(out: Path, seed: int, part: Part) -> dict[str, object]:
    """Write the shard; returns its entry in the manifest."""
    path = out / f"{part.split}-{part.first:07d}.tar"
    write_shard(path, ((sample.source_id, sample.members()) for sample in part.samples(seed)))
    return {"name": path.name, "samples": part.count, "bytes": path.stat().st_size, "sha256": sha256(path)}


def run(config: BuildConfig) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    counts = {"train": config.count, "validation": config.validation}
    size = config.shard_size
    parts = [
        Part(split, first, min(size, count - first))
        for split, count in counts.items()
        for first in range(0, count, size)
    ]
    shards = in_processes(partial(write_part, config.out, config.seed), parts, "building", chunk=1)
    write_json(config.out / MANIFEST, {"dataset": "miniature", "counts": counts, "shards": shards})
    print(f"{config.count} samples to train on and {config.validation} to validate with, {config.out}")
