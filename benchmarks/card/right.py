"""The pack is right: its pictures against reference vectors, separate rows, and its own after weights were moved."""

from __future__ import annotations

import gc
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import counts, host
from ..report import Result
from .part import Part, from_command_line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALVES = ("fp16", "bf16")  # small: the last alone, since processors without fp16 take minutes for it
PROJECTORS = ("projector-sd15", "projector-sdxl", "projector-sd3", "projector-paper")
ROUNDING = 3.0  # × the host's own error: as many more roundings as an adapter may add
LEAST = 1e-4  # of the largest value: below this no difference is looked at


def vectors(part: Part) -> None:
    """Every reference vector: projectors in the host's casting layers, the UNet through our slots."""
    from reference_unet import unet_errors
    from reference_vectors import read_reference_vectors

    for case in PROJECTORS[:1] if part.small else PROJECTORS:
        found = read_reference_vectors(case)
        weights = found.weights()
        exact = projector_error(found, weights, part.device, torch.float32)
        part.lines.add(Result(f"vectors: {case}, fp32", exact, "", LEAST))
        for name in HALVES[1:] if part.small else HALVES:
            # The same arithmetic in float32, of what the host has rounded: the least error there can be.
            rounded = projector_error(found, weights, part.device, torch.float32, DTYPES[name])
            error = projector_error(found, weights, part.device, DTYPES[name])
            part.lines.add(Result(f"vectors: {case}, {name} (rounding alone: {rounded:.1e})", error, "", 5 * rounded))
    for name in ("fp32", *(HALVES[1:] if part.small else HALVES)):
        errors = unet_errors(torch.device(part.device), DTYPES[name])
        bare, ours = errors["noise_plain"], errors["noise_adapted"]
        most = max(2 * bare, 5e-4)
        part.lines.add(Result(f"vectors: unet-sd15 through the slots, {name} (bare host: {bare:.1e})", ours, "", most))


def projector_error(
    found: Any, weights: dict, device: str, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> float:
    """Of a projector in this precision, its weights and inputs rounded to another before."""
    import comfy.ops
    from bench import core_config
    from reference_vectors import relative_error

    config = core_config.AdapterConfig.from_state_dict({f"image_proj.{key}": w for key, w in weights.items()})
    kind = host.start()("ipadapter_instruct_core.projector").Projector
    with torch.device("meta"):
        projector = kind(config, comfy.ops.manual_cast)
    first = rounded or dtype
    projector.load_state_dict({k: w.to(first).to(device, dtype) for k, w in weights.items()}, strict=True, assign=True)
    output = projector(**{name: x.to(first).to(device, dtype) for name, x in found.inputs.items()})
    return relative_error(output.float().cpu(), found.expected["output"])


def guidance(part: Part, models: Path) -> None:
    """Simple and three-way guidance against rows evaluated one by one, beside the bare host's own two."""
    import bench

    scales = bench.ThreeWay(instruct_scale=2.0, image_scale=1.5)
    for name, dtype in list(DTYPES.items())[: 1 if part.small else 3]:
        world = made_bench(models, dtype)
        plain = difference(world.cfg(world.model), separate(world))
        simple, three_way = world.application(), world.application(three_way=scales)
        most = max(ROUNDING * plain, LEAST)
        title = f"guidance: {{}} beside separate rows, {name} (bare host: {plain:.1e})"
        expected = bench.simple_guidance(world, simple)
        found = difference(world.cfg(world.apply(simple)), expected)
        part.lines.add(Result(title.format("simple"), found, "", most))
        expected = world.three_way(three_way, bench.CFG, scales)
        found = difference(world.cfg(world.apply(three_way)), expected)
        part.lines.add(Result(title.format("three-way"), found, "", most))
        without = difference(world.cfg(world.model), expected)
        assert without > 0.01, "the adapter does nothing, so that nothing was compared"


def made_bench(models: Path, dtype: torch.dtype) -> Any:
    import bench
    from tools.tiny.models import TINY_NAMES

    checkpoint = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
    return bench.Bench(models, checkpoint, TINY_NAMES["ip-adapter-instruct-sd15.bin"], dtype)


def separate(world: Any) -> torch.Tensor:
    """The bare host's guidance, of its rows one by one."""
    import bench

    full, uncond = world.predict(world.positive), world.predict(world.negative)
    return uncond + bench.CFG * (full - uncond)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - expected.float()).abs().max() / expected.abs().max())


def memory(part: Part) -> None:
    """The host's memory manager takes our weights away between two pictures, or leaves them on the processor."""
    import comfy.model_management as management

    ours = host.Ours(host.unet("small"))
    model = ours.apply(**host.THREE_WAY)
    weights = ours.adapter.adapter

    def sampled(model: Any) -> torch.Tensor:
        return host.sample(model, counts.LATENT, 3)

    bare = [sampled(ours.model) for _ in range(3)]
    repeat = max(difference(other, bare[0]) for other in bare[1:])  # libraries may choose other kernels
    most = max(2 * repeat, LEAST)
    first, again = sampled(model), sampled(model)
    name = f"memory: picture of a second run (bare host: {repeat:.1e})"
    part.lines.add(Result(name, difference(again, first), "", most))
    management.unload_all_models()
    gone = not any(loaded.model is ours.adapter.patcher for loaded in management.current_loaded_models)
    gone &= all(weight.device.type == "cpu" for weight in weights.parameters())
    part.lines.add(
        Result("memory: weights that stay on the card once unloaded", float(not gone), "", 0.0),
        Result("memory: picture after they were loaded again", difference(sampled(model), first), "", most),
    )
    state, management.vram_state = management.vram_state, management.VRAMState.NO_VRAM
    try:
        management.unload_all_models()
        forget()
        low = ours.apply(**host.THREE_WAY)
        found = difference(sampled(low), first)
        kept = sum(weight.device.type == "cpu" for weight in weights.parameters())
    finally:
        management.vram_state = state
        management.unload_all_models()
    part.lines.add(
        Result("memory: picture where no memory is to be had", found, "", most),
        Result("memory: weights left on the processor there, of all", kept / len(list(weights.parameters())), ""),
    )


def forget() -> None:
    """So that Apply projects the picture anew."""
    host.start()("nodes.host.memory")._results.clear()
    gc.collect()


def waits(part: Part) -> None:
    """How often a step makes the processor wait for the card, beyond the bare host's own."""
    ours = host.Ours(host.unet("small"))
    bare = synchronisations(ours.model)
    part.lines.add(Result("waits: the bare host's step", bare, ""))
    mask, share = {"mask": host.half_mask()}, {"start_percent": 0.1, "end_percent": 0.9}
    for name, settings, most in (
        ("simple", {}, 0), ("three-way", host.THREE_WAY, 0), ("three-way, mask", host.THREE_WAY | mask, 0),
        ("three-way, start and end", host.THREE_WAY | share, 1),
    ):  # fmt: skip
        found = synchronisations(ours.apply(**settings)) - bare
        part.lines.add(Result(f"waits: ours beyond it, {name}", found, "", most))


def synchronisations(model: Any) -> int:
    """In one step of a warm MODEL; on a processor, the values that are read back."""
    if not torch.cuda.is_available():
        return counts.count(model).read_backs
    host.sample(model, counts.LATENT, counts.STEPS)  # what is done once is done
    found = 0

    def at_step(step: int) -> None:
        torch.cuda.set_sync_debug_mode("warn" if step == counts.MEASURED - 1 else "default")
        if step == counts.MEASURED:
            nonlocal found
            found = sum("synchronizing" in str(warning.message) for warning in caught)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host.sample(model, counts.LATENT, counts.STEPS, at_step)
    return found


def main() -> None:
    part = from_command_line(__doc__)
    host.start()
    sys.path += [str(host.ROOT / "tests" / name) for name in ("host", "assets")]  # as the tests' own paths are
    from tools.tiny.models import make_tiny_models

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        models = make_tiny_models(Path(folder))
        checks: tuple[Callable[[], None], ...] = (
            lambda: vectors(part), lambda: guidance(part, models), lambda: memory(part),
        )  # fmt: skip
        for check in checks:
            check()
    waits(part)


if __name__ == "__main__":
    main()
