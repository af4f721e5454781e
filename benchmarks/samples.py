"""How long training takes to know its samples and in how much memory: by the index that `build` and `encode` write, and
by a walk through the tars where there is none. `python -m benchmarks.samples`: 10,000 made samples."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from pathlib import Path

from training.datasets.index import Shards, index_of
from training.datasets.shards import Tally, write_shard
from training.files import write_json

from .report import Result, parser, results_table, write

SAMPLES, PER_SHARD = 10_000, 500
MOST_TIME, MOST_MEMORY = 10.0, 100.0  # microseconds and bytes a sample


def make(folder: Path, samples: int = SAMPLES) -> list[Path]:
    """Shards as `encode` writes them, of the object task, but for features of 2 kB; returns their paths."""
    paths = []
    for first in range(0, samples, PER_SHARD):
        path = folder / "object" / f"train-{first // PER_SHARD:05d}.tar"
        path.parent.mkdir(exist_ok=True)
        words = [{"task": "object", "prompt": f"prompt {n}", "subject": f"thing {n % 80}"} for n in range(PER_SHARD)]
        files = [{"json": json.dumps(one).encode(), "safetensors": bytes(2000)} for one in words]
        write_shard(path, ((f"train-{first + n:09d}", one) for n, one in enumerate(files)))
        write_json(path.with_suffix(".json"), {"bytes": path.stat().st_size, "index": index_of(path)}, indent=None)
        paths.append(path)
    return paths


def cost(paths: list[Path], samples: int) -> tuple[float, float]:
    """Microseconds (the quickest of three, files in the cache) and bytes a sample."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        Shards(paths, Tally(0.0))
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    kept = Shards(paths, Tally(0.0))
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return min(times) / samples * 1e6, memory / samples


def measure(folder: Path, samples: int = SAMPLES) -> list[Result]:
    paths = make(folder, samples)
    results = []
    for name, bound in (("by its index", True), ("by a walk", False)):
        microseconds, memory = cost(paths, samples)
        results += [
            Result(f"a sample is known {name}: time", microseconds, "us", MOST_TIME if bound else None),
            Result(f"a sample is known {name}: memory", memory, "B", MOST_MEMORY if bound else None),
        ]
        for path in paths:
            path.with_suffix(".json").unlink(missing_ok=True)
    return results


def main() -> None:
    chosen = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    results_table(f"{SAMPLES:,} samples in shards of {PER_SHARD}", results)
    write(results, chosen.json)


if __name__ == "__main__":
    main()
