"""Scores with their confidence intervals, as a file and as a table of the form of the paper's Table 1."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from ipadapter_instruct_core.tasks import Task
from torch import Tensor
from training.files import write_json
from training.frozen.metrics import CLIP_SCORE_FACTOR, TASK_METRICS, bootstrap_interval

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
    """The mean of one metric over ``count`` pictures, in ``low``..``high`` at 95 %; nan for both where count is 1."""

    metric: str
    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, metric: str, values: Sequence[float] | Tensor) -> "Score":
        """From the metric's value for each picture, [B]. Raises ValueError where there is none or one is not finite."""
        low, high = bootstrap_interval(values)
        return cls(metric, torch.as_tensor(values, dtype=torch.float64).mean().item(), low, high, len(values))


@dataclass
class Results:
    """Scores by row of the table (a set of checkpoints), task and metric, and the settings that they hold for."""

    rows: dict[str, dict[Task, dict[str, Score]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, row: str, task: Task, values: dict[str, Tensor]) -> None:
        """Put a task's scores, each [B], into a row."""
        self.rows.setdefault(row, {})[task] = {metric: Score.of(metric, v) for metric, v in values.items()}

    def write(self, path: Path) -> None:
        rows = {
            row: {
                task.value: {metric: _as_json(score) for metric, score in scores.items()}
                for task, scores in tasks.items()
            }
            for row, tasks in self.rows.items()
        }
        write_json(path, {"rows": rows, "settings": self.settings})

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises ValueError where the file is missing or is not what `write` wrote."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = {
                row: {
                    Task(task): {metric: _from_json(metric, score) for metric, score in scores.items()}
                    for task, scores in tasks.items()
                }
                for row, tasks in content["rows"].items()
            }
            return cls(rows, content["settings"])
        except FileNotFoundError:
            raise ValueError(f"There is no file {path}; make it with `python -m training evaluate`.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} holds no results of an evaluation; run `python -m training evaluate`.") from None


def _as_json(score: Score) -> dict[str, Any]:
    """JSON has no nan."""
    return {key: None if value != value else value for key, value in asdict(score).items() if key != "metric"}


def _from_json(metric: str, score: dict[str, Any]) -> Score:
    return Score(metric, **{key: math.nan if value is None else value for key, value in score.items()})


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


def markdown_table(results: Results) -> str:
    """Table 1 with our rows, each mean over its interval, above the paper's; higher is better throughout.

    Raises:
        ValueError: there are no rows.
    """
    counts = {score.count for tasks in results.rows.values() for scores in tasks.values() for score in scores.values()}
    if not counts:
        raise ValueError("There are no scores to put into a table; evaluate at least one adapter.")
    header = ["", *(f"{title(task)}<br>{metric_title(metric)}" for task, metric in COLUMNS)]
    lines = [header, ["---", *["---:"] * len(COLUMNS)]]
    for row, tasks in results.rows.items():
        scores = [tasks.get(task, {}).get(metric) for task, metric in COLUMNS]
        lines.append([row.replace("|", "\\|"), *(_cell(score) for score in scores)])
    for row, values in PAPER.items():
        lines.append([f"*{row} (paper)*", *(f"*{value:.4f}*" for value in values)])
    pictures = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n"
        f"Mean and 95 % bootstrap interval over {pictures} pictures a task. The rows marked (paper) are Table 1's;\n"
        "they were measured with other data and full-size models, and do not compare with ours figure by figure.\n"
        "CLIP-S is the cosine of the paper's Sec. 4.1 times 2.5, which is our guess at how it comes to exceed 1.\n"
    )


def _cell(score: Score | None) -> str:
    if score is None:
        return MISSING
    mean, low, high = (shown(score.metric, value) for value in (score.mean, score.low, score.high))
    return f"{mean:.4f}" if score.low != score.low else f"{mean:.4f}<br>[{low:.4f}, {high:.4f}]"
