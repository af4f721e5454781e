"""Shards: tar files as webdataset writes them, read at any place so that a data order can be resumed exactly."""

import json
import mmap
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from training.files import remove_leftovers

MANIFEST = "manifest.json"
END_OF_TAR = 1024  # bytes of zeros, by which a whole file is told


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
    beside = path.with_name(f".{path.name}.{os.getpid()}")
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
    from webdataset import TarWriter

    count = 0
    with TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})
            count += 1
    return count


class Shards:
    """Random access to the samples of many shards.

    An index of every shard is read once; a sample's bytes are read from the mapped file when asked for.
    """

    def __init__(self, paths: Sequence[Path], tally: Tally) -> None:
        self.paths = list(paths)
        self.samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        self._maps: dict[int, mmap.mmap] = {}
        bad = {}
        for number, path in enumerate(self.paths):
            try:
                self._index(number, path)
            except (tarfile.TarError, OSError) as error:
                bad[_in_dataset(path)] = f"not a whole shard ({error})"
        usual = len(self.samples) // max(1, len(self.paths) - len(bad))  # samples of a shard, of which nothing is known
        for name, why in bad.items():
            tally.good(max(1, usual))
            tally.lose(name, why, max(1, usual))

    def _index(self, number: int, path: Path) -> None:
        whole: dict[str, dict[str, tuple[int, int]]] = {}
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                whole.setdefault(key, {})[ending] = (member.offset_data, member.size)
            file.seek(archive.offset)  # tarfile takes a damaged header in the middle for the end
            if file.read(END_OF_TAR) != bytes(END_OF_TAR):
                raise tarfile.ReadError("it is cut short or damaged")
        self.samples += [(number, key, places) for key, places in whole.items()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:  # a loader's worker maps the files itself
        return {**self.__dict__, "_maps": {}}

    def name(self, index: int) -> str:
        """Where a sample lies, for messages: ``dataset/shard.tar/key``."""
        number, key, _ = self.samples[index]
        return f"{_in_dataset(self.paths[number])}/{key}"

    def __getitem__(self, index: int) -> dict[str, bytes]:
        """The files of one sample, by their ending."""
        return {ending: self.file(index, ending) for ending in self.samples[index][2]}

    def file(self, index: int, ending: str) -> bytes:
        """One file of a sample, without reading its others. Raises KeyError where it has none of this ending."""
        number, _, places = self.samples[index]
        start, size = places[ending]
        if number not in self._maps:
            with open(self.paths[number], "rb") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[number][start : start + size]


def _in_dataset(path: Path) -> str:
    """A shard's name with its folder's, since every dataset has a first shard."""
    return f"{path.parent.name}/{path.name}"
