"""Adapters on held-out combinations: pictures of every trial, judged by the oracle, as counts and tables."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.tasks import GuidanceMode, Task, defaults
from PIL import Image
from torch import Tensor
from training.evaluate.grids import CELL, grid
from training.files import write_json
from training.frozen.sampling import Settings, to_pictures
from training.held import compare
from training.instructions.choose import Wording
from training.miniature.judged import report
from training.miniature.judged.cases import (
    CROSSED_TASKS,
    KNOWN_TRIALS,
    TASK_TRIALS,
    TRIALS,
    VARIED_TRIALS,
    Prompts,
    crossed_trial,
    crossed_trials,
    score,
)
from training.miniature.judged.painting import TASK_PLACE, Loaded, Models, Prepared, load_models, paint
from training.miniature.judged.report import JOINT, NO_ADAPTER, PLAIN, WORDINGS
from training.miniature.world.samples import TASKS

# Settings that change a picture; the others choose the pictures.
HELD = ("count", "seed", "steps", "text_scale", "guidance", "instruct_scale", "image_scale")


@dataclass
class EvaluateConfig:
    """Make the pictures, judge them and write the tables. What OUT/results.json has is not made again.

    Attributes:
        rows: names and adapter files, as in `--rows joint A.safetensors single B-{task}.safetensors`, where "{task}"
            stands for the name of each task; a task without a file is left out. The tables compare rows of the names
            joint, plain (IPAdapter+), single and fixed.
        out: gets results.json, report.md and the sheet pictures.png.
        models: the folder that `expand` has written.
        count: pictures of a trial.
        tables: tasks: all rows and the bare base; rows: all rows on the five tasks alone; wordings: rows that follow
            instructions and know all tasks; weights: the rows `weighed` at each of `weights`; known: the rows
            `crossed`, on combinations that training has shown; crossing: the rows `crossed`, the same conditions for
            each task.
        prompts: of the table crossing, the first also of the sheet. Open ones leave out what the task takes, whole ones
            say it too, against the condition; no prompt leaves all to the instruction.
        wording: of the instructions, in all tables but that of wordings. The row fixed is told fixed ones.
        weight: strength of the adapters by task, as in `--weight all 1.0 face 0.9`; by default the reference's.
        guidance: by default each task's own. Rows that follow no instructions take simple guidance always.
        instruct_scale: of three-way guidance, in place of the reference's.
        image_scale: as instruct_scale.
        batch: pictures at once.
        examples: conditions of things and of people on the sheet.
    """

    rows: dict[str, str]
    out: Path = Path("runs/miniature/evaluation")
    models: Path = Path("runs/miniature/expanded")
    count: int = 500
    tables: tuple[Literal["tasks", "rows", "wordings", "weights", "known", "crossing"], ...] = (
        "tasks", "wordings", "weights", "known", "crossing"
    )  # fmt: skip
    prompts: tuple[Prompts, ...] = ("open", "whole")
    wording: Literal["fixed", "bank", "unseen"] = "bank"
    weight: dict[str, float] = field(default_factory=dict)
    weights: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
    weighed: tuple[str, ...] = (JOINT, PLAIN)
    crossed: tuple[str, ...] = (JOINT, PLAIN)
    guidance: Literal["task", "simple", "three-way"] = "task"
    text_scale: float = 5.0
    instruct_scale: float | None = None
    image_scale: float | None = None
    steps: int = 20
    seed: int = 0
    batch: int = 500
    examples: int = 4
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Job:
    """A row's pictures of a trial. ``wording`` is "" where the row follows no instructions."""

    trial: str
    row: str
    wording: Wording | Literal[""]
    weight: float

    @property
    def task(self) -> Task:
        return TRIALS[self.trial].task

    @property
    def key(self) -> str:
        return f"{self.trial} | {self.row} | {self.wording} | {self.weight}"


def run(config: EvaluateConfig) -> None:
    """Raises what `load_models` raises, and ValueError where the folder's results are of other settings or models."""
    _check_names(config)
    models = load_models(config.rows, config.models, torch.device(config.device))
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / report.RESULTS
    results = open_results(config, models, path)
    found = results["found"]
    jobs = [job for job in plan(config, models) if found.get(job.key, {}).get("sha256") != _sha256(models, job)]
    start, finished = time.monotonic(), 0
    for trial in dict.fromkeys(job.trial for job in jobs):
        prepared = Prepared.of(models, TRIALS[trial].cases(config.count, config.seed), config.batch)
        for job in (job for job in jobs if job.trial == trial):
            rates = score(prepared.cases, pictures_of(config, models, prepared, job), models.oracle)
            about = {**asdict(job), "sha256": _sha256(models, job), "device": models.device_name}
            found[job.key] = {**about, "rates": {name: list(rate) for name, rate in rates.items()}}
            finished += 1
        write_json(path, results)
        print(f"{finished} of {len(jobs)} after {time.monotonic() - start:.0f} s: {trial}", flush=True)
    write_json(path, results)
    sheet(config, models, config.out / "pictures.png")
    print(report.write(config.out))


def _check_names(config: EvaluateConfig) -> None:
    if NO_ADAPTER in config.rows:
        raise ValueError(f'A row cannot be named "{NO_ADAPTER}", which is the bare base; choose another name.')
    unknown = set(config.weight) - {"all", *TASK_TRIALS}
    if unknown:
        raise ValueError(f"--weight names {unknown.pop()!r}; it takes all, {', '.join(TASK_TRIALS)}.")


def _sha256(models: Models, job: Job) -> str:
    loaded = models.adapters.get((job.row, job.task))
    return loaded.sha256 if loaded else ""


def open_results(config: EvaluateConfig, models: Models, path: Path) -> dict:
    """The folder's results so far, for a run to add to; ``shown`` is what the tables take where none says another."""
    settings = {name: value for name, value in asdict(config).items() if name in HELD}
    held = {"settings": settings, "models": models.identities()}
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**held, "found": {}}
    compare(results, held, path.parent, "pictures made")
    return results | {"shown": {"wording": config.wording, "weight": {t.value: strength(config, t) for t in TASKS}}}


def strength(config: EvaluateConfig, task: Task) -> float:
    """Of the adapters, where no table says another."""
    return config.weight.get(task.value, config.weight.get("all", defaults(task, Base.SD15).weight))


def plan(config: EvaluateConfig, models: Models) -> list[Job]:
    """What the tables need, each job once, those of a trial in a row."""
    jobs: list[Job] = []

    def add(trials: dict, rows: list[str], wordings: tuple[Any, ...], weights: tuple[float | None, ...]) -> None:
        for trial, (task, _) in trials.items():
            for row in rows:
                loaded = models.adapters.get((row, task))
                if row == NO_ADAPTER:
                    jobs.append(Job(trial, row, "", 0.0))
                elif loaded is not None:
                    told = wordings if loaded.adapter.config.follows_instructions else ("",)
                    own = [strength(config, task) if weight is None else weight for weight in weights]
                    jobs.extend(Job(trial, row, words, weight) for words in told for weight in own)

    def given(rows: tuple[str, ...]) -> list[str]:
        return [row for row in rows if row in config.rows]

    def add_each(trials: dict, *rows: str) -> None:
        for row in rows:
            add(trials, [row], (report.own_wording(row, config.wording),), (None,))

    told = (config.wording,)
    if "tasks" in config.tables:
        add_each(TASK_TRIALS | VARIED_TRIALS, NO_ADAPTER, *config.rows)
    if "rows" in config.tables:
        add_each(TASK_TRIALS, *config.rows)
    if "wordings" in config.tables:
        add(TASK_TRIALS, [row for row, path in config.rows.items() if TASK_PLACE not in path], WORDINGS, (None,))
    if "weights" in config.tables:
        add(TASK_TRIALS, given(config.weighed), told, config.weights)
    if "known" in config.tables:
        add(KNOWN_TRIALS, given(config.crossed), told, (None,))
    if "crossing" in config.tables:
        add(crossed_trials(config.prompts), [NO_ADAPTER, *given(config.crossed)], told, (None,))
    return sorted(dict.fromkeys(jobs), key=lambda job: list(TRIALS).index(job.trial))


def settings_of(config: EvaluateConfig, task: Task, loaded: Loaded | None, weight: float) -> Settings:
    """How pictures of a task are sampled with an adapter, or with none."""
    follows = loaded is not None and loaded.adapter.config.follows_instructions
    simple = not follows or config.guidance == "simple"
    settings = Settings.of_task(task, Base.SD15, config.steps, config.text_scale, weight, simple)
    scales = {"instruct_scale": config.instruct_scale, "image_scale": config.image_scale}
    settings = replace(settings, **{name: value for name, value in scales.items() if value is not None})
    if follows and config.guidance == "three-way":
        settings = replace(settings, guidance=GuidanceMode.THREE_WAY)
    return settings


def pictures_of(config: EvaluateConfig, models: Models, prepared: Prepared, job: Job) -> Tensor:
    """[N, 3, 64, 64] in 0-1."""
    loaded = models.adapters.get((job.row, job.task))
    settings = settings_of(config, job.task, loaded, job.weight)
    return paint(models, prepared, loaded, job.wording, settings, config.batch)


def sheet(config: EvaluateConfig, models: Models, path: Path) -> None:
    """The same conditions under each instruction, and by IPAdapter+, with the first of the kinds of prompts."""
    columns = [(PLAIN, Task.STYLE), *((JOINT, task) for task in (*CROSSED_TASKS["things"], Task.FACE))]
    columns = [column for column in columns if column in models.adapters]
    if not columns or not config.examples:
        return
    pictures: list[tuple[Image.Image | None, ...]] = []
    captions: list[tuple[str, ...]] = []
    for who in CROSSED_TASKS:
        cases = TRIALS[crossed_trial(who, config.prompts[0], Task.STYLE)].cases(config.examples, config.seed)
        made = [([_large(Image.fromarray(case.picture)) for case in cases], [""] * config.examples)]
        made += [_column(config, models, who, *column) for column in columns]
        pictures += zip(*(images for images, _ in made), strict=True)
        captions += zip(*(texts for _, texts in made), strict=True)
    titles = ["Condition", *("IPAdapter+" if row == PLAIN else task.value.capitalize() for row, task in columns)]
    grid(pictures, [""] * len(pictures), titles, path, captions)


def _column(config: EvaluateConfig, models: Models, who: str, row: str, task: Task) -> tuple[list, list[str]]:
    """Pictures and their prompts; blank where the task is not for things, or not for people."""
    if task not in CROSSED_TASKS[who]:
        return [None] * config.examples, [""] * config.examples
    job = Job(crossed_trial(who, config.prompts[0], task), row, config.wording, strength(config, task))
    cases = TRIALS[job.trial].cases(config.examples, config.seed)
    made = to_pictures(pictures_of(config, models, Prepared.of(models, cases, config.batch), job))
    nothing = "" if config.prompts[0] == "no" else "(no prompt)"
    return [_large(image) for image in made], [case.prompt or nothing for case in cases]


def _large(image: Image.Image) -> Image.Image:
    return image.resize((CELL, CELL), Image.Resampling.NEAREST)
