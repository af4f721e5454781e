"""How much longer a step takes: ratios to the bare host, as the median of rounds in which all take turns.

A round samples a few steps with each MODEL, in an order that is reversed every other round; the first step of each,
which fills what is kept for the run, does not count. The spread is that of the middle half of the rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from typing import Any

import torch

from . import host, popular
from .report import Result, parser, table, write

MOST = 1.04  # × the bare host, for the same rows
THREADS = os.cpu_count() or 1
# size → (latents' side, rounds, steps that count in each, threads). At real dimensions a step takes seconds on a
# CPU, so the latents are of a picture of 256 × 256 there; threads gain a small operation nothing, and spread its time.
SETTINGS = {"small": (8, 40, 3, 1), "real": (32, 6, 1, THREADS)}
REAL_ON_CUDA = (64, 40, 4, THREADS)


class StepClock:
    """Seconds a step, from the model's first answer to its last: only there a card is waited for."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.moments: list[float] = []

    def at_step(self, step: int) -> None:
        if step in (0, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return (self.moments[-1] - self.moments[0]) / self.last


def time_steps(model: Any, latent: int, steps: int, batch: int = 1) -> float:
    clock = StepClock(steps)
    with torch.inference_mode():
        host.sample(model, latent, steps + 1, clock.at_step, batch)
    return clock.seconds


def interleave(
    models: dict[str, Any], latent: int, rounds: int, steps: int, batch: int = 1, within: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds a step of each model, by round; an order, then its reverse, so that no model is always first.

    ``within`` so many seconds; two rounds are taken in any case.
    """
    order = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begun > within:
            break
        for name in order:
            seconds[name].append(time_steps(models[name], latent, steps, batch))
        order.reverse()
    return seconds


def models(size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The MODELs that are compared with each other, the bare host first: with two rows, and with four."""
    model = host.unet(size)
    ours = host.Ours(model)
    two = {"bare host, 2 rows": model, "ours, simple": ours.apply()}
    if popular.FOLDER:
        two[popular.NAME] = popular.Popular(model, [width for _, width in ours.adapter.config.layers]).apply()
    four = {"bare host, 4 rows": host.with_rows(model, 2), "ours, three-way": ours.apply(**host.THREE_WAY)}
    return two, four


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(size: str, latent: int, rounds: int, steps: int) -> list[Result]:
    """Time both groups, print their table, and return the medians."""
    found, rows = [], []
    for group in models(size):
        seconds = interleave(group, latent, rounds, steps)
        bare = next(iter(seconds))
        for name, times in seconds.items():
            milliseconds = statistics.median(times) * 1000
            found.append(Result(f"steps, {size}: {name}", milliseconds, "ms"))
            row = [name, f"{milliseconds:.1f} ms", "", "", ""]
            if name != bare:
                low, middle, high = quartiles([a / b for a, b in zip(times, seconds[bare], strict=True)])
                target = MOST if name.startswith("ours") else None
                result = Result(f"steps, {size}: {name}: times the bare host", middle, "", target)
                found += [
                    result,
                    Result(f"steps, {size}: {name}: lower quartile", low, ""),
                    Result(f"steps, {size}: {name}: upper quartile", high, ""),
                ]
                goal = "" if target is None else f"<= {target:g}"
                row = [name, f"{milliseconds:.1f} ms", f"{middle:.3f}", f"{low:.3f} - {high:.3f}", goal]
            rows.append(row)
    title = (
        f"Time of one step, SD1.5's 16 layers, {size} dimensions, latents {latent}x{latent}, "
        f"{rounds} rounds of {steps} steps, {hardware()}"
    )
    table(title, ["", "median", "x bare", "middle half", "target"], rows)
    return found


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} {platform.machine()} cores, fp32"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=host.SIZES, help="only this size")
    options.add_argument("--rounds", type=int, help="rounds, in place of 40 at the small size and 6 at the real one")
    options.add_argument("--latent", type=int, help="side of the latents, in place of 8 and 32")
    options.add_argument("--threads", type=int, help="threads, in place of 1 at the small size and all at the real one")
    chosen = options.parse_args()
    host.start()
    found = []
    for size in [chosen.size] if chosen.size else host.SIZES:
        settings = REAL_ON_CUDA if size == "real" and torch.cuda.is_available() else SETTINGS[size]
        torch.set_num_threads(chosen.threads or settings[3])
        found += measure(size, chosen.latent or settings[0], chosen.rounds or settings[1], settings[2])
    write(found, chosen.json)


if __name__ == "__main__":
    main()
