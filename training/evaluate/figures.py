"""The paper's figures as files: learning curves (Fig. 7), t-SNE of the instructions (Fig. 4), grids (Figs. 6, 8, 9)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ipadapter_instruct_core.tasks import Task, phrase
from pydantic import Field
from torch import Tensor
from training.evaluate.grids import models_grid, rewordings_grid
from training.evaluate.index import read_index, read_lines
from training.evaluate.scores import metric_title, shown, title
from training.frozen.metrics import TASK_METRICS, Embedder
from training.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

logger = logging.getLogger("ipadapter_instruct")

DPI = 160
INK, GREY, RULE = "#16181d", "#565c68", "#e3e6eb"
# Okabe and Ito's colours, which stay apart to the colour-blind; the yellow is left out, too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
SMOOTHING = 0.05  # of the steps shown: how far a training loss is averaged
TRAINING_LOSS = "Training loss"
TASKS = tuple(TASK_METRICS)

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]  # label: steps, values


class FiguresConfig(Settings):
    """What to draw; each part is left out where its source is not given."""

    output: Path
    """Folder that the figures are written into."""
    format: Literal["png", "jpg", "webp"] = "png"
    """Of every figure."""

    runs: dict[str, Path] = {}
    """Learning curves: a label and the folder of each training run, joint and single-task ones alike."""
    curves: tuple[Task, ...] = (Task.STYLE, Task.FACE)
    """Learning curves: tasks to show, a column each."""
    loss: bool = False
    """Learning curves: show the training loss of these tasks too."""

    open_clip: str | None = None
    """t-SNE of the instructions: file or folder of the OpenCLIP model that embeds them."""
    instructions: Path | None = None
    """t-SNE: folder of the instructions, {task}.txt each; the bank that comes with the project if not given."""
    per_task: int = Field(1000, ge=2)
    """t-SNE: instructions of each task at most."""

    pictures: Path | None = None
    """Grids: the folder of pictures that `evaluate` wrote."""
    rows: tuple[str, ...] = ()
    """Grids: rows of the evaluation to show, in this order; all if not given."""
    against: str | None = None
    """Grids: the row of IPAdapter+, for a grid of its own beside the others."""
    examples: int = Field(2, ge=1)
    """Grids: pictures of each task, and conditions that are shown with several wordings."""
    wordings: int = Field(4, ge=2)
    """Grids: wordings of one condition."""


def run(config: FiguresConfig) -> None:
    """Draw what the settings name a source for.

    Raises:
        ValueError: they name none, or a source is missing, empty or damaged.
    """
    if not (config.runs or config.open_clip or config.pictures):
        raise ValueError("There is nothing to draw from; give --runs, --open-clip or --pictures, or several of them.")
    config.output.mkdir(parents=True, exist_ok=True)
    if config.runs:
        plot_learning_curves(read_runs(config.runs, config.curves, config.loss), _announced(config, "learning-curves"))
    if config.open_clip:
        _instructions(config)
    if config.pictures:
        _grids(config)


def _announced(config: FiguresConfig, name: str) -> Path:
    path = config.output / f"{name}.{config.format}"
    logger.info("Drawing %s", path)
    return path


def _instructions(config: FiguresConfig) -> None:
    from ipadapter_instruct_core.encoders import load_open_clip
    from training.instructions import KEYWORDS, load_bank

    assert config.open_clip is not None
    embedder = Embedder(load_open_clip(config.open_clip))
    bank = {task: phrases[: config.per_task] for task, phrases in load_bank(config.instructions).items()}
    embeddings = {task: embedder.texts(phrases) for task, phrases in bank.items()}
    crosses = {task: embedder.texts([phrase(task)]) for task in KEYWORDS}
    plot_instructions(embeddings, crosses, _announced(config, "instructions"))


def _grids(config: FiguresConfig) -> None:
    assert config.pictures is not None
    pictures = read_index(config.pictures)
    made = list(dict.fromkeys(picture.row for picture in pictures))
    rows = [row for row in config.rows or made if row != config.against]
    if rows:
        models_grid(config.pictures, pictures, rows, TASKS, config.examples, _announced(config, "tasks"))
    if config.against:
        columns = [config.against, *rows]
        models_grid(config.pictures, pictures, columns, TASKS, config.examples, _announced(config, "against"))
    for number, row in enumerate(rows):
        path = config.output / f"rewordings-{number}.{config.format}"
        if rewordings_grid(config.pictures, pictures, row, config.wordings, config.examples, path):
            logger.info("Drawn %s: %s", path, row)


# Fig. 7.


def read_runs(runs: Mapping[str, Path], tasks: Sequence[Task], loss: bool = False) -> dict[Task, dict[str, Curves]]:
    """Scores against steps, by task, metric and label, from each run's ``validation.jsonl``.

    With ``loss`` a third metric, "Training loss", from its ``metrics.jsonl``. Steps that were trained again after an
    interruption count once, as last written.

    Raises:
        ValueError: a run has no log, or no run has the scores of a task.
    """
    unknown = [task.value for task in tasks if task not in TASK_METRICS]
    if unknown or not tasks:
        known = ", ".join(task.value for task in TASKS)
        raise ValueError(f"--curves takes one or more of {known}, not {', '.join(unknown) or 'none'}; name others.")
    found: dict[Task, dict[str, dict[str, dict[int, float]]]] = {
        task: {metric: {} for metric in (*TASK_METRICS[task], *([TRAINING_LOSS] if loss else []))} for task in tasks
    }
    for label, folder in runs.items():
        for step, line in _steps(folder / "validation.jsonl"):
            for task in tasks:
                for metric, value in line.get(task.value, {}).items():
                    if metric in TASK_METRICS[task]:
                        found[task][metric].setdefault(label, {})[step] = shown(metric, value)
        for step, line in _steps(folder / "metrics.jsonl") if loss else ():
            for task in tasks:
                if f"loss/{task.value}" in line:
                    found[task][TRAINING_LOSS].setdefault(label, {})[step] = line[f"loss/{task.value}"]
    for task, metrics in found.items():
        if not any(metrics[metric] for metric in TASK_METRICS[task]):
            raise ValueError(
                f'No run has validation scores of the task "{task.value}"; leave it out of --curves, or validate on it.'
            )
    return {
        task: {metric: {label: _curve(points) for label, points in of.items()} for metric, of in metrics.items()}
        for task, metrics in found.items()
    }


def _curve(points: Mapping[int, float]) -> tuple[Sequence[int], Sequence[float]]:
    steps = sorted(points)
    return tuple(steps), tuple(points[step] for step in steps)


def _steps(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in read_lines(path, "train"):
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{path} is not the log of a training run: a line of it names no step; see --runs.")
        yield line["step"], line


def plot_learning_curves(curves: Mapping[Task, Mapping[str, Curves]], path: Path, *, shares: bool = False) -> None:
    """A column a task, a panel for each of its metrics, a line for each run, in the same look throughout; ``shares``
    are shown between 0 and 1."""
    labels = list(dict.fromkeys(label for metrics in curves.values() for lines in metrics.values() for label in lines))
    height = max(len(metrics) for metrics in curves.values())
    figure = _figure(4.2 * len(curves), 2.5 * height + 0.6)
    panels = figure.subplots(height, len(curves), sharex="col", squeeze=False)
    handles = {}
    for column, (task, metrics) in enumerate(curves.items()):
        panels[0, column].set_title(title(task), fontweight="bold", loc="left")
        panels[-1, column].set_xlabel("Training step")
        for axes, (metric, lines) in zip(panels[:, column], metrics.items(), strict=True):
            _style(axes)
            axes.set_ylabel(metric_title(metric))
            if shares:
                axes.set_ylim(0, 1.02)  # so that a marker at 1 is whole
            for label, (steps, values) in lines.items():
                line = _draw_line(axes, labels.index(label), steps, values, noisy=metric == TRAINING_LOSS)
                handles.setdefault(label, line)
    figure.align_ylabels()
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=2 * len(curves), frameon=False)
    figure.savefig(path)


def _draw_line(axes: "Axes", look: int, steps: Sequence[int], values: Sequence[float], noisy: bool) -> "Line2D":
    """A noisy line is averaged; one of few points shows each of them."""
    (line,) = axes.plot(
        steps,
        _smoothed(values) if noisy else values,
        DASHES[look % len(DASHES)],
        color=COLOURS[look % len(COLOURS)],
        marker=None if noisy or len(steps) > 40 else MARKERS[look % len(MARKERS)],
        markersize=4.5,
    )
    return line


def _smoothed(values: Sequence[float]) -> "np.ndarray":
    """A moving average over a share of the curve, over fewer values towards its ends."""
    import numpy as np

    window = np.ones(max(1, round(SMOOTHING * len(values))))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


# Fig. 4.


def project(embeddings: Mapping[Task, Tensor], fixed: Mapping[Task, Tensor]) -> tuple[dict, dict]:
    """t-SNE of all instructions together, by their cosine, always from the same start.

    Args:
        embeddings: [B, D] a task.
        fixed: [1, D] or [D] a task.

    Returns:
        the same two mappings with places [B, 2] and [1, 2] as NumPy arrays.

    Raises:
        ValueError: there are fewer than four instructions in all.
    """
    import numpy as np
    from sklearn.manifold import TSNE

    parts = [*embeddings.values(), *(row.reshape(1, -1) for row in fixed.values())]
    rows = np.concatenate([part.float().cpu().numpy() for part in parts])
    if len(rows) < 4:
        raise ValueError(f"t-SNE needs at least four instructions, and these are {len(rows)}; add some.")
    perplexity = min(30.0, (len(rows) - 1) / 3)  # scikit-learn's default, and what it allows
    places = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0).fit_transform(rows)
    split = np.split(places, np.cumsum([len(part) for part in parts])[:-1])
    first, last = split[: len(embeddings)], split[len(embeddings) :]
    return dict(zip(embeddings, first, strict=True)), dict(zip(fixed, last, strict=True))


def plot_instructions(embeddings: Mapping[Task, Tensor], fixed: Mapping[Task, Tensor], path: Path) -> None:
    """Fig. 4: each instruction a point in its task's colour and shape, the fixed prompts as crosses. See `project`."""
    points, crosses = project(embeddings, fixed)
    figure = _figure(6.4, 5.6)
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(RULE)
    looks = {task: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, task in enumerate(Task)}
    for task, places in points.items():
        colour, marker = looks[task]
        label = f"{title(task)} ({len(places):,})"
        axes.scatter(*places.T, s=12, c=colour, marker=marker, linewidths=0, alpha=0.75, label=label)
    for task, places in crosses.items():
        # A white cross below the coloured one, so that it stands out among its own points.
        axes.scatter(*places.T, s=190, c="white", marker="x", linewidths=7)
        axes.scatter(*places.T, s=150, c=looks[task][0], marker="x", linewidths=3.2)
    if crosses:
        axes.scatter([], [], s=24, c=INK, marker="x", linewidths=2.4, label="Fixed prompts")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, markerscale=1.6)
    figure.savefig(path)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure in inches, drawn without a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _style(axes: "Axes") -> None:
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
