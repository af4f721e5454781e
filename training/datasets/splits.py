"""Which samples are built and which of them validate: chosen by hashes, so that it never depends on the machine."""

import hashlib
import heapq
import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from training.datasets.sources.builder import Item, chance
from training.datasets.sources.files import Place
from training.datasets.sources.folders import LeftOut, LeftOutCount

logger = logging.getLogger("ipadapter_instruct")

SPLITS = ("validation", "train")


def choose(
    items: Iterable[Item | LeftOut],
    validation: int,
    limit: int | None,
    seed: int,
    hashes: dict[str, str] | None = None,
    left_out: LeftOutCount | None = None,
) -> dict[str, list[Item]]:
    """The items of each split, in the source's order, so that files are read one after another.

    At most ``limit`` items are taken, at random. No group, and no picture file with the same bytes, is in both splits.
    Exactly ``validation`` items validate, but no more than a tenth of all (at least one, where there are two groups).
    ``hashes`` holds those of pictures that were read before; new ones are added. So is what is left out.

    Raises:
        ValueError: there are no items.
    """
    left_out = LeftOutCount() if left_out is None else left_out
    numbered: Iterable[tuple[int, Item]] = enumerate(left_out.taken_from(items))
    if limit is not None:
        numbered = sorted(heapq.nsmallest(limit, numbered, key=lambda pair: chance(seed, pair[1].source_id)))
    chosen = list({item.source_id: item for _, item in numbered}.values())
    if not chosen:
        told = f": {left_out}" if left_out.counts else ""
        raise ValueError(f"The source holds no samples; check that its folders and files are the right ones{told}.")
    if not validation:
        return {"validation": [], "train": chosen}
    chosen = merge_groups(chosen, {} if hashes is None else hashes)
    held_out, left_out = _hold_out(chosen, validation, seed)
    return {
        "validation": [item for item in chosen if item.source_id in held_out],
        "train": [item for item in chosen if item.source_id not in held_out | left_out],
    }


def _hold_out(items: list[Item], validation: int, seed: int) -> tuple[set[str], set[str]]:
    """The ids that validate, and those that are left out because the rest of their group does."""
    groups: dict[str, list[str]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item.source_id)
    wanted = min(validation, max(1, len(items) // 10)) if len(groups) > 1 else 0
    if wanted < validation:
        logger.warning(
            f"{wanted} instead of {validation} samples validate: at most a tenth of the {len(items)} here, "
            f"which come from {len(groups)} different pictures or identities."
        )
    held_out: set[str] = set()
    too_large = []
    for group in sorted(groups, key=lambda name: chance(seed, "validation", name)):
        if len(groups[group]) <= wanted - len(held_out):
            held_out.update(groups[group])
        else:
            too_large.append(groups[group])
    if len(held_out) == wanted:
        return held_out, set()
    smallest = min(too_large, key=len)
    cut = wanted - len(held_out)
    return held_out.union(smallest[:cut]), set(smallest[cut:])


def merge_groups(items: list[Item], hashes: dict[str, str]) -> list[Item]:
    """The items, with groups that share a picture file, or files of the same bytes, made one."""
    parents = {item.group: item.group for item in items}

    def root(name: str) -> str:
        while parents[name] != name:
            parents[name] = name = parents[parents[name]]
        return name

    contents = _contents(items, hashes)
    owners: dict[Place | str, str] = {}
    for item in items:
        for place in _places(item):
            other, mine = root(owners.setdefault(contents.get(place, place), item.group)), root(item.group)
            parents[max(other, mine)] = min(other, mine)
    return [item if item.group == root(item.group) else replace(item, group=root(item.group)) for item in items]


def _places(item: Item) -> list[Place]:
    return [item.condition] if item.target is None else [item.condition, item.target]


def _contents(items: list[Item], known: dict[str, str]) -> dict[Place, str]:
    """The hash of each picture; files whose size no other file has are not read, and unreadable ones left out.

    ``known`` are hashes by place, size and time of the last change; new ones are added.
    """
    stats: dict[Path, os.stat_result] = {}
    by_size: dict[int | None, list[Place]] = defaultdict(list)
    for place in dict.fromkeys(place for item in items for place in _places(item)):
        try:
            if place.path not in stats:
                stats[place.path] = place.path.stat()
        except OSError:
            continue
        by_size[stats[place.path].st_size if place.row is None else None].append(place)
    doubtful = [place for size, places in by_size.items() if size is None or len(places) > 1 for place in places]
    hashes = {}
    for place in tqdm(doubtful, desc="looking for pictures that are there twice", unit="picture", disable=None):
        stat = stats[place.path]
        key = f"{place.path}|{place.row}|{place.column}|{stat.st_size}|{stat.st_mtime_ns}"
        try:
            hashes[place] = known[key] = known.get(key) or hashlib.sha256(place.read()).hexdigest()
        except ValueError:  # skipped, and listed, when its turn comes
            continue
    return hashes
