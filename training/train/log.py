"""What a run tells: lines of metrics.jsonl, trackers, and the progress bar."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from training.datasets.shards import write_atomically
from training.train import checkpoints
from training.train.batches import TASKS

try:
    import resource
except ImportError:  # on Windows
    resource = None

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"


class RunLog:
    """Sums of the steps since the last line, on the device, so that no step waits for its own figures."""

    def __init__(self, accelerator: Accelerator, out: Path, first_step: int) -> None:
        self.accelerator, self.out = accelerator, out
        self.names: list[list[str]] = []
        self.losses: list[Tensor] = []
        self.tasks: list[Tensor] = []
        self.waited = 0.0
        self.started = time.perf_counter()
        if accelerator.is_main_process:
            for name in (METRICS, VALIDATION):
                _cut_after(out / name, first_step)

    def add(self, names: list[str], tasks: Tensor, losses: Tensor, waited: float) -> None:
        """One micro-batch: its samples, their tasks and losses [B], and the seconds its loading took."""
        self.names.append(names)
        self.tasks.append(tasks)
        self.losses.append(losses.detach())
        self.waited += waited

    def check(self, step: int, folder: Path) -> None:
        """Raises ValueError where a loss since the last check is not a number; names the sample."""
        if not self.losses or bool(torch.isfinite(torch.stack(self.losses)).all()):
            return
        micro = next(n for n, losses in enumerate(self.losses) if not torch.isfinite(losses).all())
        bad = [self.names[micro][n] for n in torch.isfinite(self.losses[micro]).logical_not().nonzero()[:, 0].tolist()]
        batch = f"the batch of {', '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
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
        total, count = self.accelerator.reduce(sums, "sum").tolist()
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
        }
        self.write(METRICS, step, figures)
        self.accelerator.log(figures, step=step)
        self.restart()
        return figures

    def restart(self) -> None:
        """Begin a new stretch of steps."""
        self.names, self.losses, self.tasks, self.waited = [], [], [], 0.0
        self.started = time.perf_counter()

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
