"""Looking at an adapter while it is trained: always the same held-out samples, seeds and instructions."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.encoders import load_open_clip
from ipadapter_instruct_core.tasks import Task
from PIL import Image, ImageOps
from torch import Tensor
from training.datasets.sample import Sample
from training.features.draws import Draw, Dropped
from training.features.stored import Source, encode_batch
from training.frozen.base import FrozenBase
from training.frozen.encoders import Encoders
from training.frozen.metrics import TASK_METRICS, Embedder, task_scores
from training.frozen.sampling import Settings, conditionings, initial_noise, sample, to_pictures
from training.train.adapter import TrainedAdapter, losses
from training.train.batches import collate
from training.train.settings import TrainConfig

warn_once = cache(logging.getLogger("ipadapter_instruct").warning)


class Validator:
    """Loss of each task, and pictures with their scores."""

    def __init__(self, config: TrainConfig, base: FrozenBase, encoders: Encoders | None, source: Source) -> None:
        self.config, self.base, self.encoders, self.source = config, base, encoders, source
        self.settings = config.validation
        scorer = self.settings.scorer
        self.places = self._readable_places()
        self.embedder = Embedder(load_open_clip(str(scorer)).to(base.device)) if scorer is not None else None

    def __call__(self, step: int, adapter: Adapter) -> dict[str, dict[str, float]]:
        """Figures by task and name; pictures go to ``OUT/validation/step-N/TASK.jpg``."""
        figures = {}
        with torch.inference_mode():
            for task, places in self.places.items():
                loss = self._loss(adapter, self._draws(task, places[: self.settings.samples]))
                figures[task.value] = {"loss": loss}
                if self.settings.pictures:
                    draws = self._draws(task, places[: self.settings.pictures])
                    figures[task.value] |= self._pictures(step, task, adapter, draws)
        return figures

    def _readable_places(self) -> dict[Task, list[int]]:
        """The first samples of each task; those that cannot be read are counted now, not met in the middle of a run."""
        places: dict[Task, list[int]] = {}
        for task, candidates in self.source.by_task.items():
            for place in candidates:
                if len(places.setdefault(task, [])) == max(self.settings.samples, self.settings.pictures):
                    break
                try:
                    self.source.item(Draw(task, place, 0.0, Dropped.NOTHING, 0, 0))
                    self.source.pictures(place)
                    places[task].append(place)
                except (KeyError, TypeError, ValueError, OSError) as error:
                    self.source.tally.skip(self.source.shards.name(place), str(error))
        return {task: found for task, found in places.items() if found}

    def _draws(self, task: Task, places: Sequence[int]) -> list[Draw]:
        """Timesteps spread evenly; nothing dropped; the task's fixed instruction.

        Seeds count within the task, so that runs on all tasks and on one are looked at alike.
        """
        spread = self.base.schedule.config.num_train_timesteps / len(places)
        return [
            Draw(task, place, 0.0, Dropped.NOTHING, int((n + 0.5) * spread), noise_seed=n)
            for n, place in enumerate(places)
        ]

    def _batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        device = self.base.device
        batch = collate([{**self.source.item(draw), "timestep": draw.timestep} for draw in draws])
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.encoders is not None:
            moved = encode_batch(self.encoders, moved)
        if "pooled" in moved:
            moved["time_ids"] = self.base.size_condition(moved["latents"].shape[-1] * 8, len(draws))
        return moved

    def _loss(self, adapter: Adapter, draws: Sequence[Draw]) -> float:
        size, total = self.config.micro_batch_size, 0.0
        for start in range(0, len(draws), size):
            batch = self._batch(draws[start : start + size])
            values = losses(self.base.unet, TrainedAdapter(adapter), self.base.schedule, batch, self.base.unet.dtype)
            total += float(values.sum())
        return total / len(draws)

    def _pictures(self, step: int, task: Task, adapter: Adapter, draws: Sequence[Draw]) -> dict[str, float]:
        batch = self._batch(draws)
        simple = not adapter.config.follows_instructions
        settings = Settings.of_task(task, self.base.kind, self.settings.steps, self.settings.text_scale, simple=simple)
        conditions = conditionings(adapter, batch, self._rows(), settings)
        noise = initial_noise([draw.noise_seed for draw in draws], batch["latents"].shape[1:])
        latents = sample(self.base, conditions, settings.coefficients(), noise, settings.steps)
        made = to_pictures(self.base.decode(latents))
        found = [self.source.pictures(draw.sample) for draw in draws]
        folder = self.config.out / "validation" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(condition, target, picture) for (condition, target), picture in zip(found, made, strict=True)]
        sheet(rows, min(256, made[0].width)).save(folder / f"{task.value}.jpg", quality=92)
        if self.embedder is None or task not in TASK_METRICS:
            return {}
        samples = [Sample.from_members(self.source.shards[draw.sample]) for draw in draws]
        return self._scores(task, [row[0] for row in rows], made, samples)

    def _scores(
        self, task: Task, conditions: list[Image.Image], made: list[Image.Image], samples: list[Sample]
    ) -> dict[str, float]:
        images, texts = self.embedder.images, self.embedder.texts
        prompts, captions = [entry.prompt for entry in samples], [entry.caption for entry in samples]
        embeddings = (images(made), images(conditions), texts(prompts), texts(captions))
        values = task_scores(task, *embeddings, [bool(caption) for caption in captions])
        if len(values) < len(TASK_METRICS[task]):
            missing = ", ".join(name for name in TASK_METRICS[task] if name not in values)
            warn_once(f"No {task.value} sample says what its condition shows, so {missing} is left out of validation.")
        return {name: float(value.mean()) for name, value in values.items()}

    def _rows(self) -> Mapping[str, Tensor]:
        rows = self.encoders.rows() if self.encoders is not None else self.source.rows
        return {name: states.to(self.base.device) for name, states in rows.items()}


def sheet(rows: Sequence[Sequence[Image.Image]], side: int) -> Image.Image:
    """Pictures in rows, each fitted into a square of ``side`` pixels: here condition, target, and what was made."""
    gap = side // 32
    width, height = (gap + (side + gap) * count for count in (len(rows[0]), len(rows)))
    result = Image.new("RGB", (width, height), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            fitted = ImageOps.pad(picture, (side, side), color="white")
            result.paste(fitted, (gap + (side + gap) * x, gap + (side + gap) * y))
    return result
