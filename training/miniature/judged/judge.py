"""What the CLIP scores of `python -m training evaluate` are worth: those of true targets, and what the oracle sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ipadapter_instruct_core.encoders import load_open_clip
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.cli.verbs import read_config
from training.datasets.sample import decode_picture
from training.evaluate.cases import held_out
from training.evaluate.index import Picture, read_index
from training.evaluate.scores import Rows, Score, markdown_table, title
from training.evaluate.settings import EvaluateConfig
from training.frozen.metrics import Embedder, task_scores
from training.miniature.judged.cases import REPLICATED, WANTED, Rate
from training.miniature.judged.report import table, text
from training.miniature.models import oracle
from training.miniature.world.drawn import to_tensor

# The first that each task takes from the condition.
FACTORS = {task: REPLICATED if task is Task.EVERYTHING else wanted[:1] for task, wanted in WANTED.items()}


@dataclass
class JudgeConfig:
    """Attributes:
    pictures: folders that `python -m training evaluate` has written.
    config: the settings of the first of them.
    """

    pictures: tuple[Path, ...] = (Path("runs/miniature/table"),)
    config: Path = Path("training/miniature/configs/evaluate.toml")


def run(config: JudgeConfig) -> None:
    print(markdown_table(of_targets(read_config("evaluate", [str(config.config)])[0])))
    print(of_oracle(config.pictures))


def of_oracle(folders: Sequence[Path]) -> str:
    """A table of how many pictures of each row show what their conditions show; rewordings are not counted."""
    titles = ["", *(f"{title(task)}<br>{', '.join(factors)}" for task, factors in FACTORS.items())]
    lines, judge = [], oracle.load()
    for folder in folders:
        pictures = [picture for picture in read_index(folder) if int(Path(picture.condition).stem) == picture.index]
        for row in dict.fromkeys(picture.row for picture in pictures):
            of_row = [picture for picture in pictures if picture.row == row]
            lines.append([row, *(text(agreement(judge, folder, of_row, task)) for task in FACTORS)])
    return table(titles, lines)


def of_targets(config: EvaluateConfig) -> Rows:
    """The first scorer's scores of the pictures that training would have wanted."""
    embedder, found = Embedder(load_open_clip(str(config.scorer[0]))), {}
    for task, cases in held_out(config).items():
        pictures = [
            [decode_picture(case.sample.target or case.sample.condition) for case in cases],
            [case.condition for case in cases],
        ]
        words = [[case.sample.prompt for case in cases], [case.sample.caption for case in cases]]
        made, conditions = map(embedder.images, pictures)
        prompts, captions = map(embedder.texts, words)
        scores = task_scores(task, made, conditions, prompts, captions)
        groups = [case.sample.group for case in cases]
        found[task] = {metric: Score.of(metric, values, groups) for metric, values in scores.items()}
    return {"Targets": found}


@torch.inference_mode()
def agreement(judge: oracle.Oracle, folder: Path, pictures: Sequence[Picture], task: Task) -> Rate | None:
    """How many of a task's pictures show what their conditions show, to the oracle's eye; None where there are none."""
    chosen = [picture for picture in pictures if picture.task is task]
    if not chosen:
        return None
    shown, wanted = (
        oracle.judge(judge, to_tensor(np.stack([np.asarray(Image.open(folder / name)) for name in names])))
        for names in ([picture.name for picture in chosen], [picture.condition for picture in chosen])
    )
    agree = torch.stack([shown[factor] == wanted[factor] for factor in FACTORS[task]]).all(dim=0)
    return Rate(int(agree.sum()), len(agree))
