"""Where a training step's time goes, how much arithmetic it is, and how fast the chip does arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# The marks of a step, as a trace by `train --profile` has them; none of these lies in another.
PARTS = (
    "wait for samples",
    "autoencoder",
    "image encoder",
    "text encoder",
    "instruction encoder",
    "adapter",
    "network",
    "gradients",
    "optimizer",
)
REST = "rest"


def seconds_by_part(step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Mean seconds of each part of a step on a processor, and of the rest, which makes up the whole."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        whole = statistics.mean(seconds_of(step) for _ in range(rounds))
    marked = {event.key: event.cpu_time_total / 1e6 / rounds for event in found.key_averages() if event.key in PARTS}
    return {**marked, REST: whole - sum(marked.values())}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
