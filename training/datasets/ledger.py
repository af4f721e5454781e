"""What a build was begun with, which of its shards are finished, and the manifest of them all."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from training.datasets.index import index_of
from training.datasets.shards import BLOCKS, MANIFEST, Tally
from training.datasets.sources.builder import Item
from training.datasets.sources.folders import LeftOut, LeftOutCount
from training.datasets.splits import SPLITS
from training.files import sha256, write_json
from training.held import hold

SETTINGS = "settings.json"
BUILT = "samples built"
PLAN = "plan"  # the setting that is a hash of all samples to be made


@dataclass(frozen=True)
class Block:
    """The items of one shard."""

    name: str
    split: str
    items: list[Item]


def blocks_of(splits: dict[str, list[Item]], size: int) -> Iterator[Block]:
    """The splits cut into shards of ``size`` samples: the same ones whoever makes them."""
    for split in SPLITS:
        for number, start in enumerate(range(0, len(splits[split]), size)):
            yield Block(f"{split}-{number:05d}", split, splits[split][start : start + size])


def claim(out: Path, settings: dict[str, Any], defaults: dict[str, Any] = {}, free: Collection[str] = ()) -> None:
    """Write down what decides on the samples, or hold it against what the build in ``out`` was begun with.

    While nothing is built there, it may change: a mistyped path comes out only when models are loaded, after this.

    Args:
        defaults: of the settings, which a build of before they were there is taken to have had.
        free: settings that may change, see `hold`.

    Raises:
        ValueError: a setting has changed, or the folder holds other shards.
    """
    # Half-written shards (.NAME.tar.…) count, since another rank may be writing them.
    begun = (out / MANIFEST).exists() or any(out.glob("*.tar*")) or any((out / BLOCKS).glob("*.json"))
    path = out / SETTINGS
    if begun and not path.exists():
        raise ValueError(f"{out} holds shards that no build was begun with; name an empty folder.")
    (out / BLOCKS).mkdir(parents=True, exist_ok=True)
    plan = {PLAN: settings[PLAN]}
    others = {name: value for name, value in settings.items() if name != PLAN}
    hold(path, others, BUILT, defaults, free, begun)
    try:
        hold(path, plan, BUILT)
    except ValueError:
        raise ValueError(
            f"The source has changed since the build in {out} began; build into an empty folder."
        ) from None


def claim_models(out: Path, identities: dict[str, str]) -> None:
    """The same of the models that make targets. Raises ValueError where an earlier run had another one."""
    hold(out / SETTINGS, {"models": identities}, BUILT)


def plan_hash(splits: dict[str, list[Item]]) -> str:
    """A hash of all that the items say, apart from where the source lies."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for item in splits[split]:
            names = [field.name for field in fields(item) if field.name not in ("condition", "target")]
            digest.update(json.dumps([split, *(getattr(item, name) for name in names)], default=str).encode())
    return digest.hexdigest()


@dataclass
class Contents:
    """What a shard holds, and which of its items it lacks.

    Attributes:
        tasks: samples of each task.
        skipped: name of each bad item, and what is wrong.
        left_out: items that are no damage, and why they are not there.
        pictures: of each sample its key, its group and the hashes of the source's pictures.
    """

    tasks: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    pictures: list[list[str]] = field(default_factory=list)


def finish_block(out: Path, block: Block, contents: Contents) -> dict[str, Any]:
    """Note that a shard is there, and what it holds; returns the note."""
    path, tasks = out / f"{block.name}.tar", contents.tasks
    summary = {
        "split": block.split,
        "samples": tasks.total(),
        "tasks": dict(sorted(tasks.items())),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "skipped": [{"name": name, "why": why} for name, why in contents.skipped],
        "left_out": [asdict(left) for left in contents.left_out],
        "pictures": contents.pictures,
        "index": index_of(path),
    }
    write_json(out / BLOCKS / f"{block.name}.json", summary, indent=None)
    return summary


def finished(out: Path, block: Block) -> dict[str, Any] | None:
    """What a finished shard holds; None for one that is to be made, or that is gone or cut short."""
    try:
        summary = json.loads((out / BLOCKS / f"{block.name}.json").read_text(encoding="utf-8"))
        size = (out / f"{block.name}.tar").stat().st_size
    except FileNotFoundError:
        return None
    return summary if summary["bytes"] == size else None


def write_manifest(
    out: Path,
    dataset: str,
    settings: dict[str, Any],
    blocks: list[Block],
    summaries: list[dict[str, Any]],
    max_skipped: float,
    left_out: LeftOutCount,
) -> str:
    """Write the manifest of finished shards, whichever ranks made them; returns what to say of it.

    Raises:
        ValueError: a larger share of the samples than ``max_skipped`` was skipped.
    """
    tasks: Counter[str] = Counter()
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    shards, skipped = [], []
    for block, summary in zip(blocks, summaries, strict=True):
        skipped += skipped_of(summary)
        for left in summary["left_out"]:
            left_out.add(LeftOut(**left))
        tasks.update(summary["tasks"])
        counts[block.split] += summary["samples"]
        shards.append({"name": f"{block.name}.tar", **{key: summary[key] for key in ("samples", "bytes", "sha256")}})
    Tally(max_skipped, sum(len(block.items) for block in blocks), skipped).check()
    manifest = {
        "dataset": dataset,
        "tasks": dict(sorted(tasks.items())),
        "settings": settings,
        "counts": counts,
        "shards": shards,
        "skipped": [{"name": name, "why": why} for name, why in skipped],
        "left_out": left_out.listed(),
    }
    write_json(out / MANIFEST, manifest)
    told = f"; {left_out}" if left_out.counts else ""
    return (
        f"{out}: {counts['train']} samples to train on and {counts['validation']} to validate with, in {len(shards)} "
        f"shards; {len(skipped)} skipped{', named in its manifest' if skipped else ''}{told}."
    )


def skipped_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and reasons of what was skipped in a finished shard."""
    return [(skip["name"], skip["why"]) for skip in summary["skipped"]]
