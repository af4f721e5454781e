"""Apply on a re-run, clones of a patched MODEL, memory over many re-runs, and the pack's import at host start."""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.tiny.models import clip_gain
from tools.tiny.shapes import clip_vision_shapes
from tools.tiny.strided_weights import strided_weights

from . import host, popular
from .report import Result, parser, results_table, write

CLONE_MS, CLONE_BYTES = 1.0, 0
# Python's own objects come and go; the popular pack's clones are 147 MiB each.
GROWTH_BYTES, RSS_GROWTH_MIB = 0, 32
IMPORT_S = 0.3
REPEATS, PATIENCE_MS, RE_RUNS, SETTLED, IMPORTS = 10, 10_000, 50, 5, 5
MIB = 2**20


def tensor_bytes() -> int:
    """Bytes of every tensor that is alive, shared ones counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_mib() -> float:
    """Memory of this process, without what the allocator holds in reserve; Linux only, 0 elsewhere."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def median_ms(action: Callable[[], Any]) -> float:
    """Median of ten times, or of those that fit into ten seconds, three at least."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < REPEATS and sum(times) < PATIENCE_MS):
        begun = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1000)
    return statistics.median(times)


def clip_vision() -> Any:
    """The host's CLIP vision in the shape of ViT-H/14, from random weights."""
    import comfy.clip_vision

    return comfy.clip_vision.load_clipvision_from_sd(strided_weights(clip_vision_shapes(), clip_gain, seed=3))


def measure_apply(name: str, apply: Callable[[], Any], bound: bool) -> list[Result]:
    """Apply's time, first and again, and what a clone of its MODEL costs."""
    begun = time.perf_counter()
    patched = apply()
    first = (time.perf_counter() - begun) * 1000
    again = median_ms(apply)
    before = tensor_bytes()
    clones = [patched.clone() for _ in range(REPEATS)]
    held = (tensor_bytes() - before) / REPEATS
    del clones
    return [
        Result(f"apply: {name}: first run, with ViT-H/14", first, "ms"),
        Result(f"apply: {name}: re-run, nothing changed", again, "ms"),
        Result(f"apply: {name}: clone of the MODEL", median_ms(patched.clone), "ms", CLONE_MS if bound else None),
        Result(f"apply: {name}: tensors of a clone", held, "B", CLONE_BYTES if bound else None),
    ]


def measure_memory(name: str, apply: Callable[[], Any], bound: bool) -> list[Result]:
    """Growth over 50 re-runs of Apply and a sampling step, each taking the place of the one before."""
    tensors = resident = 0.0
    for run in range(RE_RUNS + SETTLED):
        if run == SETTLED:
            tensors, resident = tensor_bytes(), resident_mib()
        patched = apply()  # the old one goes when this one has come, as in the host's cache
        with torch.inference_mode():
            host.sample(patched, 8, 1)
    return [
        Result(
            f"apply: {name}: tensors grown over {RE_RUNS} re-runs",
            tensor_bytes() - tensors,
            "B",
            GROWTH_BYTES if bound else None,
        ),
        Result(
            f"apply: {name}: process grown over {RE_RUNS} re-runs",
            resident_mib() - resident,
            "MiB",
            RSS_GROWTH_MIB if bound else None,
        ),
    ]


def measure_import(name: str, folder: Path, bound: bool) -> Result:
    """Median over fresh processes of what the host itself does to load the pack, its own nodes loaded."""
    command = [sys.executable, "-m", "benchmarks.start_up", str(folder)]
    seconds = []
    for _ in range(IMPORTS):
        done = subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"The host could not load {folder}:\n{done.stdout}{done.stderr}")
        seconds.append(float(done.stdout.split()[-1]))
    return Result(f"apply: {name}: import at host start", statistics.median(seconds), "s", IMPORT_S if bound else None)


def measure(name: str, pack: Any, folder: Path) -> list[Result]:
    bound = name == "ours"

    def apply() -> Any:
        with torch.inference_mode():
            return pack.apply()

    found = measure_apply(name, apply, bound)
    pack.vision = host.RandomVision()  # ViT-H/14's time would be most of that of the re-runs
    found += measure_memory(name, apply, bound)
    if bound:
        found += measure_memory(f"{name}, all nodes on references", pack.apply_all, bound)
    found.append(measure_import(name, folder, bound))
    results_table(f"Apply, clones, memory and import: {name} (SD1.5's 16 layers, small dimensions)", found)
    return found


def main() -> None:
    chosen = parser(__doc__).parse_args()
    host.start()
    model, vision = host.unet("small"), clip_vision()
    ours = host.Ours(model, vision)
    found = measure("ours", ours, host.ROOT)
    if popular.FOLDER:
        other = popular.Popular(model, [width for _, width in ours.adapter.config.layers], vision)
        found += measure(popular.NAME, other, Path(popular.FOLDER).resolve())
    write(found, chosen.json)


if __name__ == "__main__":
    main()
