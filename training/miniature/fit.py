"""The loop that every model of the miniature is trained by: resumable, with averaged weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Fit:
    """Attributes:
    steps: of the optimiser; the learning rate warms up over ``warmup`` of them and falls to ``final_share`` of itself.
    average: share of the running average of the weights that stays in each step.
    """

    steps: int
    rate: float
    warmup: int = 100
    average: float = 0.995
    final_share: float = 0.02
    decay: float = 0.01
    save_every: int = 200

    def rate_at(self, step: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min((step + 1) / self.warmup, 1) * (self.final_share + (1 - self.final_share) * fall)


def fit(
    model: nn.Module, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]], settings: Fit, folder: Path
) -> nn.Module:
    """Train a model in place, and return it with the averaged weights.

    Args:
        loss_of: step number -> loss, and figures for the log. It draws its batch from the number alone, so that a
            run which was cut off goes on as if it had not been.
        folder: holds ``state.pt``, from which the run goes on, and ``log.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=settings.decay)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = 0
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    began = time.monotonic()
    for step in tqdm(range(first, settings.steps), initial=first, total=settings.steps, mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        loss, figures = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(settings.average, (step + 1) / (step + 10))
        for name, tensor in model.state_dict().items():
            average[name] = torch.lerp(tensor, average[name], keep) if tensor.is_floating_point() else tensor.clone()
        done = step + 1
        if done % 20 == 0:
            line = {"step": done, "loss": loss.item(), **figures, "seconds": round(time.monotonic() - began, 1)}
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        if done % settings.save_every == 0 or done == settings.steps:
            state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, folder / "state.part")
            os.replace(folder / "state.part", folder / "state.pt")
    model.load_state_dict(average)
    return model.eval()
