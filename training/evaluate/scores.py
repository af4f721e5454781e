"""Scores with their confidence intervals, as a file and as a table of the form of the paper's Table 1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ipadapter_instruct_core.tasks import Task
from torch import Tensor
from training.frozen.metrics import CLIP_SCORE_FACTOR, TASK_METRICS, mean_interval

TASK_TITLES = {Task.EVERYTHING: "Replication", Task.FACE: "Faces"}  # where Table 1 does not use our word
MISSING = "–"

# Table 1, column by column in the order of TASK_METRICS.
PAPER: dict[str, tuple[float, ...]] = {
    "Single-task models": (0.9152, 0.8523, 1.0988, 0.7615, 0.7670, 0.6351, 0.7337, 0.6424, 0.5154, 0.6012),
    "IPAdapter-Instruct": (0.9098, 0.8542, 1.1171, 0.7776, 0.8040, 0.6402, 0.7082, 0.6517, 0.5264, 0.5976),
    "Fixed instruct prompts": (0.9086, 0.8528, 1.1141, 0.7810, 0.8029, 0.6408, 0.7151, 0.6517, 0.5159, 0.6009),
}
COLUMNS = [(task, metric) for task, metrics in TASK_METRICS.items() for metric in metrics]


@dataclass(frozen=True)
class Score:
    """The mean of one metric over ``count`` pictures, in ``low``..``high`` at 95 %; nan for both where these are of
    one group (a person, a photograph) alone."""

    metric: str
    mean: float
    low: float
    high: float
    count: int
    groups: int

    @classmethod
    def of(cls, metric: str, values: Tensor, groups: Sequence[str]) -> "Score":
        """From the metric's value for each picture, [B], and the group that it belongs to.

        Raises:
            ValueError: there is none, or one is not finite.
        """
        low, high = mean_interval(values.tolist(), groups)
        return cls(metric, values.double().mean().item(), low, high, len(values), len(set(groups)))


Rows = dict[str, dict[Task, dict[str, Score]]]  # of a table: scores by row (a set of checkpoints), task and metric


def as_json(tables: dict[str, Rows]) -> dict[str, Any]:
    """The same by the names of tasks; JSON has no nan."""

    def of(score: Score) -> dict[str, Any]:
        return {key: None if value != value else value for key, value in asdict(score).items() if key != "metric"}

    return {
        scorer: {
            row: {task.value: {metric: of(score) for metric, score in scores.items()} for task, scores in tasks.items()}
            for row, tasks in rows.items()
        }
        for scorer, rows in tables.items()
    }


def title(task: Task) -> str:
    """A task's name as in the head of Table 1."""
    return TASK_TITLES.get(task, task.value.capitalize())


def shown(metric: str, value: float) -> float:
    """A score on the scale of the paper's tables and plots.

    Table 1's CLIP-S reaches 1.1171, which a cosine cannot. We assume that the paper gave it
    ClipScore's factor of 2.5, the only one that it has elsewhere; the cosine is then 0.45. The rest is as it is.
    """
    return CLIP_SCORE_FACTOR * value if metric == "CLIP-S" else value


def metric_title(metric: str) -> str:
    return "CLIP-S × 2.5" if metric == "CLIP-S" else metric


def markdown_table(rows: Rows) -> str:
    """Table 1 with our rows, each mean over its interval, above the paper's; higher is better throughout.

    Raises:
        ValueError: there are no rows.
    """
    scores = [score for tasks in rows.values() for found in tasks.values() for score in found.values()]
    if not scores:
        raise ValueError("There are no scores to put into a table; evaluate at least one adapter.")
    header = ["", *(f"{title(task)}<br>{metric_title(metric)}" for task, metric in COLUMNS)]
    lines = [header, ["---", *["---:"] * len(COLUMNS)]]
    for row, tasks in rows.items():
        found = [tasks.get(task, {}).get(metric) for task, metric in COLUMNS]
        lines.append([row.replace("|", "\\|"), *(_cell(score) for score in found)])
    for row, values in PAPER.items():
        lines.append([f"*{row} (paper)*", *(f"*{value:.4f}*" for value in values)])
    pictures, groups = (_range([getattr(score, name) for score in scores]) for name in ("count", "groups"))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n"
        f"Mean over {pictures} pictures a task, and 95 % bootstrap interval over the {groups} people or photographs\n"
        "that they are of. The rows marked (paper) are Table 1's; they were measured with other data and full-size\n"
        "models, and do not compare with ours figure by figure.\n"
        "CLIP-S is the cosine of the paper's Sec. 4.1 times 2.5, which is our guess at how it comes to exceed 1.\n"
    )


def _range(numbers: Sequence[int]) -> str:
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def _cell(score: Score | None) -> str:
    if score is None:
        return MISSING
    mean, low, high = (shown(score.metric, value) for value in (score.mean, score.low, score.high))
    return f"{mean:.4f}" if score.low != score.low else f"{mean:.4f}<br>[{low:.4f}, {high:.4f}]"
