"""Shards: tar files in webdataset's format, their manifest, and the count of what could not be used."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from training.files import name_beside, remove_leftovers

MANIFEST = "manifest.json"
BLOCKS = "blocks"  # folder of a build with one JSON file a finished shard


@dataclass
class Tally:
    """What was skipped and why; too large a share of it ends the run."""

    largest_share: float
    seen: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unnamed: int = 0  # items lost besides those in `skipped`, as the other samples of a shard are

    def good(self, count: int = 1) -> None:
        self.seen += count

    def lose(self, name: str, why: str, items: int = 1) -> None:
        """Take one bad item, or the many of one bad file, out of those that were counted as seen."""
        self.skipped.append((name, why))
        self.unnamed += items - 1

    def skip(self, name: str, why: str) -> None:
        """Count one bad item, where it is not known how many there will be.

        Raises:
            ValueError: more than the set share of at least 20 items seen was skipped.
        """
        self.good()
        self.lose(name, why)
        if self.seen >= 20:
            self.check()

    def check(self) -> None:
        """The same test at the end of the work, where fewer than 20 items count too."""
        lost = len(self.skipped) + self.unnamed
        if self.skipped and lost > self.largest_share * self.seen:
            named = "; ".join(f"{name}: {why}" for name, why in self.skipped[:3])
            raise ValueError(
                f"{lost} of {self.seen} items could not be used ({named}), more than the share of "
                f"{self.largest_share:g} that is allowed; mend the source, or raise --max-skipped."
            )


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        ValueError: there is none; ``what`` names the command that makes it.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {MANIFEST}; make it with `python -m training {what}`.") from None
    except ValueError:
        raise ValueError(f"{folder / MANIFEST} is damaged; run `python -m training {what}` again.") from None


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, files by ending) one after another into one tar; returns how many.

    Nothing is left behind when writing fails, as on a full disk; what killed runs left of this shard goes, too.
    """
    remove_leftovers(path)
    beside = name_beside(path)
    try:
        with open(beside, "wb") as file:
            count = write_samples(file, samples)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return count


def write_samples(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """The same into an open file, which stays open."""
    count = 0
    with tarfile.open(fileobj=file, mode="w|") as archive:
        for key, files in samples:
            count += 1
            for ending, content in sorted(files.items()):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size, member.mode = len(content), 0o444
                archive.addfile(member, io.BytesIO(content))
    return count
