"""The loop that every model of the miniature is trained by: resumable, with averaged weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

Batch = Mapping[str, Any]


def best_device() -> str:
    """Where models are trained unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def in_bfloat16(device: str) -> torch.autocast:
    """Half the bits where convolutions go several times as fast with them: on CUDA, and on processors with matrix tiles
    (AMX), of which torch tells from 2.11 on."""
    kind = torch.device(device).type
    tiles: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.autocast(
        kind, torch.bfloat16, enabled=kind == "cuda" or (kind == "cpu" and tiles.get("amx_bf16", False))
    )


Model = TypeVar("Model", bound=nn.Module)


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


class Drawn(Dataset):
    """The batches of the steps from ``first`` on; each follows from its step's number alone."""

    def __init__(self, draw: Callable[[int], Batch], first: int, last: int) -> None:
        self.draw, self.first, self.last = draw, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, place: int) -> Batch:
        return self.draw(self.first + place)


def batches(draw: Callable[[int], Batch], first: int, last: int, workers: int) -> DataLoader:
    """The batches of some steps, drawn ahead by ``workers`` processes."""
    return DataLoader(
        Drawn(draw, first, last),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )


def to_device(batch: Batch, device: str) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def fit(
    model: Model,
    draw: Callable[[int], Batch],
    loss_of: Callable[[dict[str, Any]], tuple[Tensor, dict[str, Tensor]]],
    settings: Fit,
    folder: Path,
    device: str = "cpu",
    workers: int = 0,
) -> Model:
    """Train a model in place, and return it with the averaged weights.

    Args:
        model: on ``device``; those of its parameters that ask for gradients are trained.
        draw: step number -> batch on the CPU. It draws from the number alone, so that a run which was cut off goes
            on as if it had not been.
        loss_of: batch on ``device`` -> loss, and figures for the log; in bfloat16 where `in_bfloat16` says so.
        folder: holds ``state.pt``, from which the run goes on, and ``log.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.rate, betas=(0.9, 0.99), weight_decay=settings.decay, foreach=True)
    state = model.state_dict()
    average = {name: tensor.clone() for name, tensor in state.items()}
    floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
    first = 0
    if (folder / "state.pt").exists():
        kept = torch.load(folder / "state.pt", weights_only=True, map_location=device)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        average, first = kept["average"], kept["step"]
        if first > settings.steps:
            raise ValueError(
                f"{folder} holds a run of {first} steps, more than {settings.steps}; remove it to begin anew."
            )
    began = time.monotonic()
    loader = batches(draw, first, settings.steps, workers)
    for done, batch in enumerate(tqdm(loader, initial=first, total=settings.steps, mininterval=10), start=first + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(done - 1)
        with in_bfloat16(device):
            loss, figures = loss_of(to_device(batch, device))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(settings.average, done / (done + 9))
        with torch.no_grad():
            torch._foreach_lerp_([average[name] for name in floats], [state[name] for name in floats], 1 - keep)
        if done % 20 == 0:
            _write_line(folder / "log.jsonl", done, {"loss": loss, **figures, "seconds": time.monotonic() - began})
        if done % settings.save_every == 0 or done == settings.steps:
            kept = {"model": state, "average": average, "optimizer": optimizer.state_dict(), "step": done}
            _replace(folder / "state.pt", kept)
    model.load_state_dict(average)
    return model.eval()


def _write_line(path: Path, step: int, figures: dict[str, Any]) -> None:
    """``figures`` are numbers, or tensors of one number, and looking at these waits for the device."""
    line = {"step": step, **{name: round(float(value), 5) for name, value in figures.items()}}
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def _replace(path: Path, kept: dict[str, Any]) -> None:
    """So that a run that is killed while it saves leaves the state before."""
    torch.save(kept, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def channels_last(model: Model) -> Model:
    """The model with its weights in that memory format, of which the type of torch's own `to` does not know."""
    to: Any = model.to
    return to(memory_format=torch.channels_last)
