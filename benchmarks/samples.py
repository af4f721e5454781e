"""How long training takes to know its samples and in how much memory: by the index that `encode` writes, and by a walk
through the tars, as it was before and is for raw shards. `python -m benchmarks.samples`: 10,000 made samples."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.datasets.shards import Shards, Tally, write_shard
from training.features.index import Index, index_of
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


def by_index(paths: list[Path]) -> Any:
    return Index(paths, Tally(0.0))


def by_walk(paths: list[Path]) -> Any:
    """All headers and all words, kept as they were before there was an index."""
    shards = Shards(paths, Tally(0.0))
    return shards, {n: json.loads(shards.file(n, "json")) for n in range(len(shards))}


def cost(way: Callable[[list[Path]], Any], paths: list[Path], samples: int) -> tuple[float, float]:
    """Microseconds (the quickest of three, files in the cache) and bytes a sample."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        way(paths)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    kept = way(paths)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return min(times) / samples * 1e6, memory / samples


def measure(folder: Path, samples: int = SAMPLES) -> list[Result]:
    paths = make(folder, samples)
    results = []
    for name, way, bound in (("by its index", by_index, True), ("by a walk", by_walk, False)):
        microseconds, memory = cost(way, paths, samples)
        results += [
            Result(f"a sample is known {name}: time", microseconds, "us", MOST_TIME if bound else None),
            Result(f"a sample is known {name}: memory", memory, "B", MOST_MEMORY if bound else None),
        ]
    return results


def main() -> None:
    chosen = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    results_table(f"{SAMPLES:,} samples in shards of {PER_SHARD}", results)
    write(results, chosen.json)


if __name__ == "__main__":
    main()
