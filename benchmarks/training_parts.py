"""Where a training step's time goes, how much arithmetic it is, and how fast the chip does arithmetic."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
import training.train.adapter
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training.frozen.base import FrozenBase
from training.frozen.encoders import Encoders
from training.train.adapter import TrainedAdapter
from training.train.loop import Trainer

# Each part of a step and where it is done; none of these calls another.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "VAE": ((FrozenBase, "latent_distribution"),),
    "image encoder": ((Encoders, "image_states"),),
    "text encoder": ((Encoders, "text_features"),),
    "instruction encoder": ((Encoders, "instruction_states"),),
    "adapter forward": ((TrainedAdapter, "forward"),),
    "UNet forward": ((training.train.adapter, "predict"),),
    "backward": ((Accelerator, "backward"),),
    "optimiser": (
        (Accelerator, "clip_grad_norm_"),
        (AcceleratedOptimizer, "step"),
        (AcceleratedOptimizer, "zero_grad"),
    ),
}
LOAD, REST = "load", "rest"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds of each part, summed over the steps taken while it is ``on``. On a card it waits for each part's end.

    Used as a context manager around the making of trainers too, since accelerate keeps hold of methods.
    """

    def __init__(self) -> None:
        self.on = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.stack = ExitStack()

    def __enter__(self) -> Stopwatch:
        for part, places in PARTS.items():
            for owner, name in places:
                timed = self._timed(part, getattr(owner, name))
                self.stack.enter_context(mock.patch.object(owner, name, timed))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*arguments: Any, **named: Any) -> Any:
            if not self.on:
                return method(*arguments, **named)
            synchronize()
            begun = time.perf_counter()
            result = method(*arguments, **named)
            synchronize()
            self.seconds[part] += time.perf_counter() - begun
            return result

        return run

    def step(self, trainer: Trainer, step: Callable[[], None]) -> dict[str, float]:
        """Seconds of each part of one step; the last, the rest, makes up the whole."""
        self.seconds.clear()
        waited = trainer.log.waited
        self.on = True
        whole = seconds_of(step)
        self.on = False
        found = {LOAD: trainer.log.waited - waited, **self.seconds}
        return {**found, REST: whole - sum(found.values())}


def seconds_of(action: Callable[[], Any]) -> float:
    synchronize()
    begun = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - begun


def operations(step: Callable[[], None], device: str) -> int:
    """Floating-point operations of a step's matrix multiplications, convolutions and attentions."""
    # The CPU's own attention is not counted; in its plain form it is two matrix multiplications.
    plain = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with plain, FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matrix_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of a large matrix multiplication."""
    side, times = (8192, 20) if device == "cuda" else (2048, 2)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: [left @ right for _ in range(times)]) / times for _ in range(4)]
    return 2 * side**3 / statistics.median(seconds[1:])
