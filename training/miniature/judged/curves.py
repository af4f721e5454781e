"""Learning curves by the oracle: what pictures take of held-out conditions, against the steps of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipadapter_instruct_core.tasks import Task
from training.evaluate.figures import Curves, plot_learning_curves
from training.miniature.judged import evaluate
from training.miniature.judged.painting import TASK_PLACE
from training.miniature.judged.report import AIMS, Results, read_results
from training.miniature.world.samples import TASKS
from training.train.loop import SNAPSHOTS

START = "start"  # the label of what all runs began with
FIGURES = {
    "curves": (Task.STYLE, Task.COMPOSITION, Task.OBJECT),
    "curves-more": (Task.EVERYTHING, Task.FACE),
}


@dataclass
class CurvesConfig:
    """Judge the snapshots of runs, each once, and draw the wanted figure of each task against the steps.

    Attributes:
        runs: labels and folders of runs, as in `--runs joint RUN single 'RUN-{task}'`, where "{task}" stands for the
            name of each task.
        start: the adapter that all of them began with, for step 0.
        out: gets what `evaluate` writes, curves.png and curves-more.png.
        models: the folder that `expand` has written.
        count: pictures of a task and snapshot.
        steps: of the sampler.
    """

    runs: dict[str, str]
    start: Path | None = None
    out: Path = Path("runs/miniature/curves")
    models: Path = Path("runs/miniature/expanded")
    count: int = 100
    steps: int = 12
    device: str = evaluate.EvaluateConfig.device


def run(config: CurvesConfig) -> None:
    rows = {
        f"{label}@{step}": f"{folder}/{SNAPSHOTS}/step-{step:08d}.safetensors"
        for label, folder in config.runs.items()
        for step in steps_of(folder)
    }
    if config.start:
        rows[f"{START}@0"] = str(config.start)
    evaluate.run(
        evaluate.EvaluateConfig(
            rows, config.out, config.models, config.count, ("rows",), weight={"all": 1.0}, guidance="simple",
            steps=config.steps, batch=50, examples=0, device=config.device,
        )
    )  # fmt: skip
    curves = read(config.out, list(config.runs))
    for name, tasks in FIGURES.items():
        path = config.out / f"{name}.png"
        plot_learning_curves({task: curves[task] for task in tasks}, path, shares=True)
        print(path)


def steps_of(folder: str) -> list[int]:
    """Of a run's snapshots, or of those of all tasks' runs.

    Raises:
        FileNotFoundError: there are none.
    """
    runs = {Path(folder.replace(TASK_PLACE, task.value)) for task in TASKS}
    found = {int(file.stem.removeprefix("step-")) for run in runs for file in (run / SNAPSHOTS).glob("step-*")}
    if not found:
        raise FileNotFoundError(f"{folder} has no snapshots; train it with --snapshot-every.")
    return sorted(found)


def read(folder: Path, labels: list[str]) -> dict[Task, dict[str, Curves]]:
    """By task, its wanted figure, and label: steps and shares of pictures."""
    results = read_results(folder)
    wanted = {task: AIMS[task.value][0].figure for task in TASKS}
    return {
        task: {figure: {label: _curve(results, task, figure, label) for label in labels}}
        for task, figure in wanted.items()
    }


def _curve(results: Results, task: Task, figure: str, label: str) -> tuple[list[int], list[float]]:
    points = {}
    for row in results.rows(task.value):
        name, _, step = row.rpartition("@")
        if name in (START, label):
            points[int(step)] = results.rates(task.value, row)[figure].share
    return sorted(points), [points[step] for step in sorted(points)]
