"""How the small CLIP reads the tasks' instructions: how alike those of each two tasks are in what the adapter is told,
and whether wordings that nobody trained on lie where their task does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ipadapter_instruct_core.encoders import OpenClip
from ipadapter_instruct_core.tasks import Task, phrase
from torch import Tensor
from torch.nn.functional import normalize
from training.instructions import load_bank
from training.instructions.choose import wordings
from training.miniature.judged.report import table
from training.miniature.models import clip
from training.miniature.world.samples import TASKS


@dataclass
class WordingsConfig:
    """Attributes:
    count: wordings of the bank for each task, the first ones.
    """

    count: int = 200


@torch.inference_mode()
def states(model: OpenClip, wordings: list[str]) -> Tensor:
    """[N, D]: of each wording the mean of its hidden states, which are what an adapter reads, at unit length."""
    return normalize(model.instruction_tokens(wordings).float().mean(dim=1), dim=-1)


def cosines(model: OpenClip, count: int) -> dict[tuple[Task, Task], tuple[float, float]]:
    """By two tasks: the cosine of their fixed wordings, and the mean cosine of wordings of the bank."""
    fixed = dict(zip(TASKS, states(model, [phrase(task) for task in TASKS]), strict=True))
    bank = {task: states(model, list(phrases[:count])) for task, phrases in load_bank().items()}
    return {
        (one, other): (float(fixed[one] @ fixed[other]), float((bank[one] @ bank[other].T).mean()))
        for place, one in enumerate(TASKS)
        for other in TASKS[place + 1 :]
    }


def nearest(model: OpenClip, count: int) -> dict[Task, float]:
    """The share of each task's unseen wordings that lie nearest the mean of its own wordings of the bank."""
    means = torch.stack([states(model, list(wordings("bank", task)[:count])).mean(dim=0) for task in TASKS])
    unseen = {task: states(model, list(wordings("unseen", task))) for task in TASKS}
    return {
        task: float(((unseen[task] @ means.T).argmax(dim=1) == place).float().mean())
        for place, task in enumerate(TASKS)
    }


def run(config: WordingsConfig) -> None:
    model = clip.load()
    found = cosines(model, config.count)
    lines = [[one.value, other.value, *(f"{value:.2f}" for value in both)] for (one, other), both in found.items()]
    print(table(["one task", "another", "fixed wordings", f"the bank's first {config.count}"], lines), "\n")
    near = [[task.value, f"{share:.2f}"] for task, share in nearest(model, config.count).items()]
    print(table(["task", "unseen wordings nearest its bank's mean"], near))
