"""The pack is fast: its steps beside the bare host's for as many rows, what it holds in memory, and Apply."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from .. import apply, host, popular, steps
from ..apply import MIB
from ..report import Result
from .part import Part, from_command_line

MOST = 1.02  # × the bare host with as many rows
LATENT = {"sd15": 64, "sdxl": 128}  # of pictures of 512 and of 1024 pixels
NAMES = {"sd15": "SD1.5 512", "sdxl": "SDXL 1024"}
SECONDS, ROUNDS, STEPS = 3.0, 60, 4  # for each group of MODELs that take turns


def compare(part: Part, title: str, models: dict[str, Any], latent: int, batch: int) -> None:
    """Milliseconds of the first MODEL, the bare host, and by how much the others take longer."""
    within, rounds = (0.5, 2) if part.small else (SECONDS, ROUNDS)
    for model in models.values():
        steps.time_steps(model, latent, 1, batch)  # loads it, and lets libraries choose their kernels
    times = steps.interleave(models, latent, rounds, STEPS, batch, within)
    bare, *others = times
    part.lines.add(Result(f"{title}: {bare}", statistics.median(times[bare]) * 1000, "ms a step"))
    for name in others:
        low, middle, high = steps.quartiles([a / b for a, b in zip(times[name], times[bare], strict=True)])
        target = MOST if name.startswith("ours") and not part.small else None
        spread = f"middle half of {len(times[name])} rounds: {low:.3f} - {high:.3f}"
        part.lines.add(Result(f"{title}: {name} ÷ {bare}", middle, "", target), note=f"    {spread}")


def steps_of(part: Part, base: str, name: str, dtype: torch.dtype) -> None:
    model = host.random_model(base, dtype, 32 if part.small else 320)
    latent = 16 if part.small else LATENT[base]
    ours = host.Ours(model)
    two = {"bare host, 2 rows": model, "ours, simple": ours.apply()}
    if popular.FOLDER and base == "sd15":
        two[popular.NAME] = popular.Popular(model, [width for _, width in ours.adapter.config.layers]).apply()
    four = {"bare host, 4 rows": host.with_rows(model, 2), "ours, three-way": ours.apply(**host.THREE_WAY)}
    for batch in (1,) if part.small else (1, 4):
        for models in (two, four):
            compare(part, f"{NAMES[base]}, {name}, batch {batch}", models, latent, batch)
    if name == "fp16":
        memory(part, f"{NAMES[base]}, {name}", ours, four, latent)


def memory(part: Part, title: str, ours: host.Ours, models: dict[str, Any], latent: int) -> None:
    weights = sum(p.numel() * p.element_size() for p in ours.adapter.adapter.parameters())
    part.lines.add(Result(f"{title}: the adapter's weights", weights / MIB, "MiB"))
    if not part.on_card:
        return
    grown = []
    for model in models.values():
        host.sample(model, latent, 2)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        host.sample(model, latent, 2)
        grown.append((torch.cuda.max_memory_allocated() - held) / MIB)
    bare, with_adapter = grown
    part.lines.add(
        Result(f"{title}: more memory while sampling than the bare host's 4 rows", with_adapter - bare, "MiB")
    )


def apply_times(part: Part) -> None:
    """Apply with ViT-H/14 in its real shape: with a new picture, and again."""
    vision = host.RandomVision() if part.small else apply.clip_vision()
    ours = host.Ours(host.random_model("sd15", torch.float16 if part.on_card else torch.float32, 32), vision)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        ours.apply(torch.rand(1, 512, 512, 3))
        if part.on_card:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1000)
    part.lines.add(
        Result("Apply: the first time, weights loaded", times[0], "ms"),
        Result("Apply: another picture", times[-1], "ms"),
        Result("Apply: again, nothing changed", apply.median_ms(ours.apply), "ms"),
    )


def main() -> None:
    part = from_command_line(__doc__)
    host.start()
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16} if part.on_card else {"fp32": torch.float32}
    with torch.inference_mode():
        apply_times(part)
        for base in LATENT:
            for name, dtype in dtypes.items():
                release()
                steps_of(part, base, name, dtype)


def release() -> None:
    """Lets the last MODEL go, from the host's hands too."""
    import comfy.model_management as management

    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()


if __name__ == "__main__":
    main()
