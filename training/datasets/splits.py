"""Which samples are built and which of them validate: chosen by hashes, so that it never depends on the machine."""

import heapq
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from training.datasets.sources.builder import Item, chance
from training.datasets.sources.folders import LeftOut, LeftOutCount

logger = logging.getLogger("ipadapter_instruct")

SPLITS = ("validation", "train")


def choose(
    items: Iterable[Item | LeftOut],
    validation: int,
    limit: int | None,
    seed: int,
    left_out: LeftOutCount | None = None,
) -> dict[str, list[Item]]:
    """The items of each split, in the source's order, so that files are read one after another.

    At most ``limit`` items are taken, at random. No group and no picture file is in both splits (those of the same
    bytes are found when they are read: see `twins`). Exactly ``validation`` items validate, but no more than a tenth of
    all (at least one, where there are two groups). Of tables, row groups are taken at random, so that few are read.
    What is left out is counted in ``left_out``.

    Raises:
        ValueError: there are no items.
    """
    left_out = LeftOutCount() if left_out is None else left_out
    numbered: Iterable[tuple[int, Item]] = enumerate(left_out.taken_from(items))
    if limit is not None:
        numbered = sorted(heapq.nsmallest(limit, numbered, key=lambda pair: _turn(seed, pair[1], pair[1].source_id)))
    chosen = list({item.source_id: item for _, item in numbered}.values())
    if not chosen:
        told = f": {left_out}" if left_out.counts else ""
        raise ValueError(f"The source holds no samples; check that its folders and files are the right ones{told}.")
    if not validation:
        return {"validation": [], "train": chosen}
    chosen = merge_groups(chosen)
    held_out, rest = _hold_out(chosen, validation, seed)
    return {
        "validation": [item for item in chosen if item.source_id in held_out],
        "train": [item for item in chosen if item.source_id not in held_out | rest],
    }


def _hold_out(items: list[Item], validation: int, seed: int) -> tuple[set[str], set[str]]:
    """The ids that validate, and those that are left out because the rest of their group does."""
    groups: dict[str, list[str]] = defaultdict(list)
    turns: dict[str, tuple[int, int]] = {}
    for item in items:
        groups[item.group].append(item.source_id)
        if item.group not in turns:
            turns[item.group] = _turn(seed, item, "validation", item.group)
    wanted = min(validation, max(1, len(items) // 10)) if len(groups) > 1 else 0
    if wanted < validation:
        logger.warning(
            f"{wanted} instead of {validation} samples validate: at most a tenth of the {len(items)} here, "
            f"which come from {len(groups)} different pictures or identities."
        )
    held_out: set[str] = set()
    too_large = []
    for group in sorted(groups, key=turns.__getitem__):
        if len(groups[group]) <= wanted - len(held_out):
            held_out.update(groups[group])
        else:
            too_large.append(groups[group])
    if len(held_out) == wanted:
        return held_out, set()
    smallest = min(too_large, key=len)
    cut = wanted - len(held_out)
    return held_out.union(smallest[:cut]), set(smallest[cut:])


def _turn(seed: int, item: Item, *names: str) -> tuple[int, int]:
    """Where something of an item stands in a random order, by its names; what is read together stands together."""
    return _chance_of(seed, item.condition.read_with), chance(seed, *names)


@lru_cache(maxsize=65536)
def _chance_of(seed: int, read_with: str) -> int:
    return chance(seed, "read with", read_with) if read_with else 0


class Groups:
    """Names that belong together, directly or by others (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, name: str, other: str) -> None:
        name, other = self.root(name), self.root(other)
        self._parents[max(name, other)] = min(name, other)

    def root(self, name: str) -> str:
        """The first of the names that belong to this one."""
        parents = self._parents
        while parents.setdefault(name, name) != name:
            parents[name] = name = parents[parents[name]]
        return name


def merge_groups(items: list[Item]) -> list[Item]:
    """The items, with groups that share a picture file made one."""
    groups, owners = Groups(), {}
    for item in items:
        for place in (item.condition, item.target or item.condition):
            groups.join(owners.setdefault(place, item.group), item.group)
    return [replace(item, group=groups.root(item.group)) for item in items]
