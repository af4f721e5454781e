"""Training is fast: images a second from features, as a share of the card's matrix rate, and `encode`."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from typing import Any

import torch

from ..report import Result
from ..training import MOST_OF_MATRIX_TIME
from ..training_models import Settings, Way, all_encoders, base_model, write_data
from ..training_parts import matrix_rate, operations
from .fast import NAMES
from .part import Part, from_command_line

WARM, STEPS = 2, 3
CHECKPOINTED = {"gradient_checkpointing": True}
LAYOUT, FUSED = {"channels_last": True}, {"fused_optimizer": True}
# Micro-batches, and what is changed beside them.
VARIANTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "sd15": [(16, {}), (32, {}), (64, {}), (32, LAYOUT), (32, FUSED)],
    "sdxl": [(8, {}), (16, CHECKPOINTED), (32, CHECKPOINTED), (64, CHECKPOINTED)],
}
SAMPLES = {"sd15": 192, "sdxl": 66}
KERNELS = 10


def settings_of(part: Part, base: str, folder: str) -> Settings:
    """Of the features: in the real dimensions of a base, or small."""
    if part.small:
        return Settings("small", 64, 4, part.device, "no", 0, folder, base, samples=9)
    resolution = 512 if base == "sd15" else 1024
    return Settings("real", resolution, 16, part.device, "bf16", 6, folder, base, samples=SAMPLES[base])


def encoded(part: Part, base: str, settings: Settings) -> Any:
    """Features in the folder; returns the base that they are for."""
    encoders = all_encoders(settings, with_network=False)
    few, starts = 3, []
    for _ in range(2):  # the first lets libraries choose their kernels; a start hashes all weights
        with tempfile.TemporaryDirectory() as folder:
            starts.append(write_data(replace(settings, folder=folder, samples=few), encoders))
    seconds = write_data(settings, encoders)
    rate = settings.samples / seconds
    if not part.small:  # where a start is not most of it
        rate = (settings.samples - few) / (seconds - starts[-1])
    part.lines.add(
        Result(f"{NAMES[base]}: encode", rate, "samples a second"),
        Result(f"{NAMES[base]}: encode, seconds before the first", starts[-1], "s"),
    )
    del encoders
    release(part)
    return base_model(settings)


def release(part: Part) -> None:
    gc.collect()
    if part.on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Measure:
    """Images a second of ways to take a step of one base."""

    def __init__(self, part: Part, title: str, settings: Settings, model: Any, rate: float) -> None:
        self.part, self.title, self.settings, self.model, self.rate = part, title, settings, model, rate
        self.operations_an_image = 0.0
        self.best: tuple[float, int, dict[str, Any]] = (0.0, 0, {})

    def __call__(self, micro: int, changes: dict[str, Any]) -> None:
        words = [f"micro-batch {micro}", *(name.replace("_", " ").replace(" optimizer", " AdamW") for name in changes)]
        title = f"{self.title}: {', '.join(words)}"
        try:
            self._measure(title, micro, changes)
        except torch.cuda.OutOfMemoryError:
            self.part.lines.add(note=f"{title}: does not fit into this card's memory")
        release(self.part)

    def _measure(self, title: str, micro: int, changes: dict[str, Any]) -> None:
        way = Way(replace(self.settings, batch_size=micro), "features", self.model, **changes)
        if not self.operations_an_image:
            self.operations_an_image = operations(way.step, self.part.device) / micro
        log = way.stretch(WARM, STEPS)
        images = log["images_per_second"]
        share = images * self.operations_an_image / self.rate
        if images > self.best[0]:
            self.best = (images, micro, changes)
        self.part.lines.add(
            Result(f"{title}: images a second", images, ""),
            Result(f"{title}: share of the matrix rate", share, ""),
            Result(f"{title}: peak memory", log["memory_gib"], "GiB"),
        )

    def verdict(self) -> None:
        images, micro, changes = self.best
        bound = self.part.on_card and self.settings.base == "sd15" and not self.part.small
        goal = MOST_OF_MATRIX_TIME if bound else None
        over = self.rate / (images * self.operations_an_image)
        name = f"{self.title}: the fastest step ÷ its arithmetic at the matrix rate"
        self.part.lines.add(Result(name, over, "", goal))
        if goal is not None and over > goal:
            way = Way(replace(self.settings, batch_size=micro), "features", self.model, **changes)
            profile(self.part, self.title, way)


def profile(part: Part, title: str, way: Way) -> None:
    """The kernels that take the most of the card's time in a step."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        way.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        way.step()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(kernel.self_device_time_total for kernel in kernels)
    for kernel in kernels[:KERNELS]:
        share = kernel.self_device_time_total / whole
        part.lines.add(note=f"{title}, kernel: {share:6.1%}  {kernel.count:>5} times  {kernel.key[:110]}")


def main() -> None:
    part = from_command_line(__doc__)
    rate = matrix_rate(part.device, "no" if part.small else "bf16")
    part.lines.add(Result("a large matrix product", rate / 1e12, "TFLOP/s"))
    for base, variants in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(part, base, folder)
            measure = Measure(part, NAMES[base], settings, encoded(part, base, settings), rate)
            for micro, changes in variants[:1] if part.small else variants:
                measure(4 if part.small else micro, changes)
            if part.small:
                measure(4, LAYOUT | FUSED)
            measure.verdict()
        del measure
        release(part)


if __name__ == "__main__":
    main()
