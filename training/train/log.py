"""What a run tells: lines of metrics.jsonl, trackers, and where the time of its steps goes."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.profiler import profile, schedule, tensorboard_trace_handler
from training.files import write_atomically
from training.train import checkpoints
from training.train.batches import TASKS

try:
    import resource
except ImportError:  # on Windows
    resource = None

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
WARM_UP = 3  # steps before those that are traced


class RunLog:
    """Sums of the steps since the last line, on the device, so that no step waits for its own figures."""

    def __init__(self, accelerator: Accelerator, out: Path, first_step: int, name_of: Callable[[int], str]) -> None:
        """``name_of`` a sample's place in the source, for messages."""
        self.accelerator, self.out, self.name_of = accelerator, out, name_of
        self.places: list[list[int]] = []
        self.losses: list[Tensor] = []
        self.tasks: list[Tensor] = []
        self.norms: dict[str, Tensor] = {}
        self.waited = 0.0
        self.started = time.perf_counter()
        if accelerator.is_main_process:
            for name in (METRICS, VALIDATION):
                _cut_after(out / name, first_step)

    def add(self, places: list[int], tasks: Tensor, losses: Tensor, waited: float) -> None:
        """One micro-batch: its samples, their tasks and losses [B], and the seconds its loading took."""
        self.places.append(places)
        self.tasks.append(tasks)
        self.losses.append(losses.detach())
        self.waited += waited

    def check(self, step: int, folder: Path) -> None:
        """Raises ValueError where a loss since the last check is not a number; names the sample."""
        if not self.losses or bool(torch.isfinite(torch.stack(self.losses)).all()):
            return
        micro = next(n for n, losses in enumerate(self.losses) if not torch.isfinite(losses).all())
        numbers = torch.isfinite(self.losses[micro]).logical_not().nonzero()[:, 0].tolist()
        named = ", ".join(self.name_of(self.places[micro][n]) for n in numbers[:3])
        batch = f"the batch of {named}" + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
        last_good = checkpoints.newest(folder)
        kept = f"{last_good} is the last good checkpoint" if last_good else "no checkpoint was saved yet"
        raise ValueError(
            f"The loss is no longer a number: first in {batch}, at step {step} or shortly before; {kept}. Lower the "
            "learning rate, or look at these samples."
        )

    def line(self, step: int, batch_size: int, learning_rate: float) -> dict[str, float]:
        """Gather and write what the steps since the last line came to; all ranks call this."""
        losses, tasks = torch.cat(self.losses), torch.cat(self.tasks)
        device = losses.device
        sums = torch.zeros(2, len(TASKS), device=device)
        sums[0].index_add_(0, tasks, losses)
        sums[1].index_add_(0, tasks, torch.ones_like(losses))
        reduced: Any = self.accelerator.reduce(sums, "sum")
        total, count = reduced.tolist()
        seconds = time.perf_counter() - self.started
        steps = sum(count) / batch_size
        figures: dict[str, float] = {
            "loss": sum(total) / sum(count),
            **{f"loss/{task.value}": total[n] / count[n] for n, task in enumerate(TASKS) if count[n]},
            "learning_rate": learning_rate,
            "images_per_second": sum(count) / seconds,
            "seconds_per_step": seconds / steps,
            "loader_wait_share": self.waited / seconds,
            "memory_gib": _memory(device),
            **self._finite_norms(),
        }
        self.write(METRICS, step, figures)
        self.accelerator.log(figures, step=step)
        self.restart()
        return figures

    def _finite_norms(self) -> dict[str, float]:
        """Of the line's last step; one whose gradients fp16 could not hold has none, since it was not taken."""
        values = torch.stack(list(self.norms.values())).tolist() if self.norms else []
        return {name: value for name, value in zip(self.norms, values, strict=True) if math.isfinite(value)}

    def restart(self) -> None:
        """Begin a new stretch of steps."""
        self.places, self.losses, self.tasks, self.norms, self.waited = [], [], [], {}, 0.0
        self.started = time.perf_counter()

    def has(self, name: str, step: int) -> bool:
        """Whether one of the run's JSONL files has a line of this step; all ranks call this."""
        path, found = self.out / name, False
        if self.accelerator.is_main_process and path.is_file():
            found = any(json.loads(line)["step"] == step for line in path.read_text(encoding="utf-8").splitlines())
        return broadcast_object_list([found])[0]

    def write(self, name: str, step: int, content: dict[str, Any]) -> None:
        """Append a line to one of the run's JSONL files."""
        if self.accelerator.is_main_process:
            with open(self.out / name, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **content}) + "\n")


def _memory(device: torch.device) -> float:
    """Peak memory in GiB: of the card, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _cut_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run takes again."""
    if path.is_file():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError):  # cut short when the run was killed
                continue
        write_atomically(path, "".join(line + "\n" for line in kept).encode())


class Trace(Protocol):
    """Is told of each step's end."""

    def step(self) -> None: ...


class NoTrace:
    def step(self) -> None:
        pass


@contextmanager
def profiler(steps: int, folder: Path) -> Iterator[Trace]:
    """Write a trace of ``steps`` steps, for TensorBoard, chrome://tracing or Perfetto; of none, nothing."""
    if not steps:
        yield NoTrace()
        return
    parts = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    with profile(schedule=parts, on_trace_ready=tensorboard_trace_handler(str(folder))) as found:
        yield found
