"""Batches of a run, in an order that depends on the seed alone, from any step on."""

import math
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from ipadapter_instruct_core.tasks import Task
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from training.datasets.index import out_of_files
from training.features.draws import Draws
from training.features.stored import Source

TASKS = tuple(Task)
AHEAD = 4  # batches that each of the loader's processes reads ahead
ATTEMPTS = 10  # draws of one slot before its samples are taken for lost


class Slots(Sampler[list[tuple[int, int]]]):
    """The (step, position) of each sample of a rank's micro-batches.

    The global batch of a step is cut into ``world * accumulation`` equal parts; rank r takes the parts r,
    r + world, ... one after another.
    """

    def __init__(self, first: int, last: int, batch_size: int, accumulation: int, rank: int, world: int) -> None:
        self.steps, self.accumulation, self.rank, self.world = range(first, last), accumulation, rank, world
        self.part = batch_size // (accumulation * world)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for micro in range(self.accumulation):
                start = (micro * self.world + self.rank) * self.part
                yield [(step, position) for position in range(start, start + self.part)]


class Drawn(Dataset):
    """Items by slot. A damaged sample is replaced by the slot's next draw, and its name goes with the item."""

    def __init__(self, source: Source, draws: Draws) -> None:
        self.source, self.draws = source, draws

    def __getitem__(self, slot: tuple[int, int]) -> dict[str, Any]:
        """``lost`` says why there is none, as where ten draws in a row are damaged: raised in a loader's process, it
        would be a trace."""
        damaged = []
        for attempt in range(ATTEMPTS):
            draw = self.draws.draw(*slot, attempt)
            try:
                item = self.source.item(draw)
            except (KeyError, TypeError, ValueError, OSError) as error:
                if out_of_files(error):
                    return {"lost": f"No more files can be opened ({error}); lower `workers`, or raise `ulimit -n`."}
                damaged.append((self.source.shards.name(draw.sample), str(error)))
                continue
            drawn = {"timestep": draw.timestep, "task": TASKS.index(draw.task), "place": draw.sample}
            return {**item, **drawn, "damaged": damaged}
        named = ", ".join(name for name, _ in damaged[:3])
        return {"lost": f"{ATTEMPTS} samples in a row are damaged ({named}, ...): {damaged[0][1]}."}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack what are tensors and numbers; places and names stay lists."""
    from torch.utils.data import default_collate

    lost = [item for item in items if "lost" in item]
    if lost:
        return lost[0]
    lists = {key: [item[key] for item in items] for key in items[0] if key in ("place", "damaged")}
    return lists | default_collate([{k: v for k, v in item.items() if k not in lists} for item in items])


def loader(source: Source, draws: Draws, slots: Slots, workers: int, pin_memory: bool) -> Iterator[dict[str, Any]]:
    """Micro-batches of one rank, read ahead by ``workers`` processes.

    Raises:
        ValueError: too many samples in a row are damaged.
    """
    drawn = Drawn(source, draws)
    by_pipe = workers > 0 and shared_memory() < most_shared(drawn, slots, workers)
    batches = DataLoader(
        drawn,
        batch_sampler=slots,
        num_workers=workers,
        collate_fn=collate_to_arrays if by_pipe else collate,
        pin_memory=pin_memory,
        persistent_workers=False,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_out_of_the_group,
    )
    return _unless_lost(iter(batches))  # the processes begin to read at once


def _out_of_the_group(_: int) -> None:
    """A queue signals the run's whole group of processes: the readers go on, so that the run can finish and save."""
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


def shared_memory() -> float:
    """Bytes through which processes can hand over tensors: of /dev/shm, which containers often have 64 MB of."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:  # another system, which has no such bound
        return math.inf


def most_shared(drawn: Drawn, slots: Slots, workers: int) -> int:
    """Bytes that the batches read ahead by all processes of this machine take together, by the first sample's size.

    What a process has in hand counts with those that wait for it.
    """
    first = [drawn[batch[0]] for batch in islice(slots, 1)]
    sample = sum(value.nbytes for item in first for value in item.values() if isinstance(value, Tensor))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", slots.world))  # as launchers tell it
    return processes * workers * (AHEAD + 1) * slots.part * sample


def collate_to_arrays(items: list[dict[str, Any]]) -> dict[str, Any]:
    """As `collate`, for a pipe: arrays are sent as they are, where tensors would lie in shared memory."""
    return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in collate(items).items()}


def _unless_lost(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if "lost" in batch:
            raise ValueError(batch["lost"])
        yield {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
