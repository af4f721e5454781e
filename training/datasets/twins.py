"""Pictures of the same bytes in both splits: found by the hashes noted of each shard, and taken out of training.

Splits are chosen before any picture is read, so that each is read once, by the rank that makes its shard.
"""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from training.datasets.index import Shards
from training.datasets.ledger import Block, Contents, finish_block, skipped_of
from training.datasets.shards import Tally, write_samples
from training.datasets.sources.folders import LeftOut
from training.datasets.splits import Groups
from training.files import write_atomically

WHY = "a picture of the same bytes, or of its group, validates"


def picture_hash(content: bytes) -> str:
    """16 hexadecimal digits: among a million pictures, two take each other's place with a chance of 3e-8."""
    return hashlib.sha256(content).hexdigest()[:16]


def remove_twins(out: Path, blocks: list[Block], summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take out of the training shards what shares a picture's bytes with a validation sample, and its whole group.

    May be called by many ranks at once, and again after a kill.

    Returns:
        the summaries, new ones of those shards that were written anew.
    """
    groups = Groups()
    for summary in summaries:
        for _, group, *hashes in summary["pictures"]:
            for digest in hashes:
                groups.join(f"group {group}", f"picture {digest}")
    held_out = {
        groups.root(f"group {group}")
        for block, summary in zip(blocks, summaries, strict=True)
        if block.split == "validation"
        for _, group, *_ in summary["pictures"]
    }
    result = []
    for block, summary in zip(blocks, summaries, strict=True):
        doomed = {key for key, group, *_ in summary["pictures"] if groups.root(f"group {group}") in held_out}
        result.append(_without(out, block, summary, doomed) if block.split == "train" and doomed else summary)
    return result


def _without(out: Path, block: Block, summary: dict[str, Any], doomed: set[str]) -> dict[str, Any]:
    """Write a shard without some samples; it stays as it was until the new one is whole."""
    path = out / f"{block.name}.tar"
    shards = Shards([path], Tally(0))
    kept = dict(shards.read(place) for place in shards.readable)
    names = [json.loads(kept.pop(key)["json"])["source_id"] for key in sorted(doomed & kept.keys())]
    content = io.BytesIO()
    write_samples(content, kept.items())
    write_atomically(path, content.getvalue())
    contents = Contents(
        tasks=Counter(json.loads(files["json"])["task"] for files in kept.values()),
        skipped=skipped_of(summary),
        left_out=[LeftOut(**left) for left in summary["left_out"]] + [LeftOut(name, WHY) for name in names],
        pictures=[picture for picture in summary["pictures"] if picture[0] in kept],
    )
    return finish_block(out, block, contents)
