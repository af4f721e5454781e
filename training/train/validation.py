"""Looking at an adapter while it is trained: always the same held-out samples, seeds and instructions."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from accelerate.utils import gather_object
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.encoders import load_open_clip
from ipadapter_instruct_core.tasks import Task
from PIL import Image, ImageOps
from torch import Tensor
from training.datasets.index import out_of_files
from training.datasets.sample import Sample
from training.features.draws import Draw, Dropped
from training.features.stored import FeatureSource, Source, encode_batch
from training.frozen.base import FrozenBase
from training.frozen.encoders import Encoders
from training.frozen.metrics import TASK_METRICS, Embedder, task_scores
from training.frozen.network import embedding
from training.frozen.sampling import Settings, conditionings, initial_noise, sample, to_pictures
from training.train.adapter import TrainedAdapter, losses
from training.train.batches import collate
from training.train.settings import TrainConfig

log = logging.getLogger("ipadapter_instruct")
warn_once = cache(log.warning)

Values = dict[str, list[float]]  # of samples, by a figure's name
SHOWN, AT_ONCE = 8, 8  # pictures of a task on its sheet, and made at once whatever their number


@dataclass
class Part:
    """What one process found of one task: figures of its samples, and rows of the sheet by the samples' numbers."""

    values: Values = field(default_factory=lambda: defaultdict(list))
    rows: dict[int, list[Image.Image]] = field(default_factory=dict)


class Validator:
    """Loss of each task, and pictures with their scores; each process takes its share of the samples."""

    def __init__(
        self,
        config: TrainConfig,
        base: FrozenBase,
        encoders: Encoders | None,
        source: Source,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.config, self.base, self.encoders, self.source = config, base, encoders, source
        self.settings, self.rank, self.world = config.validation, rank, world
        self.places = self._readable_places()
        self.embedder = None
        if self.settings.scorer is not None:
            scorer = load_open_clip(str(self.settings.scorer)).to(base.device)
            self.embedder = Embedder(scorer.half() if base.device.type == "cuda" else scorer)

    def __call__(self, step: int, adapter: Adapter) -> dict[str, dict[str, float]]:
        """Figures by task and name, the same on every process; all call this.

        Pictures go to ``OUT/validation/step-N/TASK.jpg``.
        """
        with torch.inference_mode():
            own = {task: self._part(task, adapter) for task in self.source.by_task}
        figures, folder = {}, self.config.out / "validation" / f"step-{step:08d}"
        for task in self.source.by_task:  # whatever this process can read of it: all gather as often
            parts = gather_object([own[task]])
            values: Values = defaultdict(list)
            for part in parts:
                for name, found in part.values.items():
                    values[name] += found
            if "loss" in values:  # else none of its samples could be read again
                figures[task.value] = _figures(values)
                if self.settings.pictures and self.embedder is not None:
                    _warn_of_missing(task, values)
            rows = {number: row for part in parts for number, row in part.rows.items()}
            if rows and self.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                shown = [rows[number] for number in sorted(rows)]
                sheet(shown, shown[0][0].width).save(folder / f"{task.value}.jpg", quality=92)
        return figures

    def _part(self, task: Task, adapter: Adapter) -> Part:
        part, places = Part(), self.places.get(task, [])
        readable = {place for place in places[self.rank :: self.world] if not self._fault(task, place)}

        def share(count: int) -> list[tuple[int, Draw]]:
            """This process's draws by their numbers, but those whose samples a disk does not give any more."""
            numbered = enumerate(self._draws(task, places[:count]))
            return [(number, draw) for number, draw in numbered if draw.sample in readable]

        self._add_losses(part, adapter, [draw for _, draw in share(self.settings.samples)])
        pictured = share(self.settings.pictures)
        for start in range(0, len(pictured), AT_ONCE):
            self._add_pictures(part, task, adapter, dict(pictured[start : start + AT_ONCE]))
        return part

    def _fault(self, task: Task, place: int) -> str:
        """Why a sample cannot be read; nothing where it can."""
        try:
            self.source.item(Draw(task, place, 0.0, Dropped.NOTHING, 0, 0))
            self.source.pictures(place)
        except (KeyError, TypeError, ValueError, OSError) as error:
            if out_of_files(error):
                raise
            log.warning("train: skipped %s: %s", self.source.shards.name(place), error)
            return str(error) or type(error).__name__
        return ""

    def _readable_places(self) -> dict[Task, list[int]]:
        """The first samples of each task that can be read; the others are counted."""
        places: dict[Task, list[int]] = {}
        for task, candidates in self.source.by_task.items():
            for place in candidates:
                if len(places.setdefault(task, [])) == max(self.settings.samples, self.settings.pictures):
                    break
                if fault := self._fault(task, place):
                    self.source.tally.skip(self.source.shards.name(place), fault)
                else:
                    places[task].append(place)
        return {task: found for task, found in places.items() if found}

    def _draws(self, task: Task, places: Sequence[int]) -> list[Draw]:
        """Timesteps spread evenly; nothing dropped; the task's fixed instruction.

        Seeds count within the task, so that runs on all tasks and on one are looked at alike.
        """
        spread = self.base.schedule.config.num_train_timesteps / max(len(places), 1)
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
            moved["added"] = self.base.added(moved["pooled"], moved["latents"].shape[-1] * 8, self.base.network.dtype)
        return moved

    def _add_losses(self, part: Part, adapter: Adapter, draws: Sequence[Draw]) -> None:
        """The losses, and whether the adapter listens: what changes where samples are told another task's wording."""
        if not draws:
            return
        own, tokens = self._pass(adapter, draws)
        part.values["loss"] += own.tolist()
        tasks = [task for task in Task if task in self.places]
        other = tasks[(tasks.index(draws[0].task) + 1) % len(tasks)]
        if other is not draws[0].task and adapter.config.follows_instructions:
            misled, changed = self._pass(adapter, [replace(draw, told=other) for draw in draws])
            part.values["misled"] += misled.tolist()
            part.values["changed"] += (changed - tokens).flatten(1).square().sum(dim=1).tolist()
            part.values["tokens"] += tokens.flatten(1).square().sum(dim=1).tolist()

    def _pass(self, adapter: Adapter, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Losses [B] and tokens [B, T, O] of all draws."""
        size, found = self.config.micro_batch_size, []
        parameter = next(adapter.parameters()).dtype
        for start in range(0, len(draws), size):
            batch = self._batch(draws[start : start + size])
            tokens = adapter.image_proj(*(batch[name].to(parameter) for name in ("image", "instruction", "prompt")))
            trained = TrainedAdapter(adapter, embedding(self.base.network))
            values = losses(self.base.network, trained, self.base.schedule, batch, self.base.network.dtype)
            found.append((values, tokens))
        values, tokens = zip(*found, strict=True)
        return torch.cat(values), torch.cat(tokens)

    def _add_pictures(self, part: Part, task: Task, adapter: Adapter, draws: Mapping[int, Draw]) -> None:
        """Pictures and scores of samples, by their numbers, all at once."""
        batch = self._batch(list(draws.values()))
        simple = not adapter.config.follows_instructions
        settings = Settings.of_task(task, self.base.kind, self.settings.steps, self.settings.text_scale, simple=simple)
        conditions = conditionings(adapter, batch, self._rows(), settings, embedding(self.base.network))
        noise = initial_noise([draw.noise_seed for draw in draws.values()], batch["latents"].shape[1:])
        latents = sample(self.base, conditions, settings.coefficients(), noise, settings.steps)
        made = to_pictures(self.base.decode(latents))
        found = [self.source.pictures(draw.sample) for draw in draws.values()]
        side = min(256, made[0].width)
        for number, (condition, target), picture in zip(draws, found, made, strict=True):
            if number < SHOWN:
                row = (condition, target, picture)
                part.rows[number] = [ImageOps.pad(one, (side, side), color="white") for one in row]
        if self.embedder is not None and task in TASK_METRICS:
            samples = [Sample.from_members(self.source.shards[draw.sample]) for draw in draws.values()]
            for name, values in self._scores(task, [row[0] for row in found], made, samples).items():
                part.values[name] += values

    def _scores(
        self, task: Task, conditions: list[Image.Image], made: list[Image.Image], samples: list[Sample]
    ) -> Values:
        assert self.embedder is not None
        images, texts = self.embedder.images, self.embedder.texts
        prompts, captions = [entry.prompt for entry in samples], [entry.caption for entry in samples]
        embeddings = (images(made), images(conditions), texts(prompts), texts(captions))
        scores = task_scores(task, *embeddings, [bool(caption) for caption in captions])
        return {name: values.tolist() for name, values in scores.items()}

    def _rows(self) -> Mapping[str, Tensor]:
        if self.encoders is not None:
            rows = self.encoders.rows()
        else:
            assert isinstance(self.source, FeatureSource)
            rows = self.source.rows
        return {name: states.to(self.base.device) for name, states in rows.items()}


def summary(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The means over all tasks, as a sentence."""
    if not figures:
        return "no sample could be read"
    means = {
        name: math.fsum(of_task[name] for of_task in figures.values()) / len(figures)
        for name in ("loss", "listens_tokens", "listens_loss")
        if all(name in of_task for of_task in figures.values())
    }
    text = f"loss {means['loss']:.4f}"
    if "listens_tokens" in means:
        text += f"; told another task's wording, tokens change by {means['listens_tokens']:.2%}"
        text += f" and the loss by {means['listens_loss']:+.4f}"
    return text


def _figures(values: Values) -> dict[str, float]:
    """Means, and of the samples that were told another task's wording how much that changed.

    ``listens_tokens`` is the tokens' change as a share of their size, 0 for an adapter that does not listen;
    ``listens_loss`` is how much the loss rises, above 0 where the own wording helps.
    """
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    if "misled" in means:
        means["listens_tokens"] = math.sqrt(means.pop("changed") / means.pop("tokens"))
        means["listens_loss"] = means.pop("misled") - means["loss"]
    return means


def _warn_of_missing(task: Task, values: Values) -> None:
    missing = ", ".join(name for name in TASK_METRICS.get(task, ()) if name not in values)
    if missing:
        warn_once(f"No {task.value} sample says what its condition shows, so {missing} is left out of validation.")


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
