"""Where the samples of many shards lie and what they are, without a walk through the tars: arrays, a row a sample."""

import errno
import io
import json
import os
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipadapter_instruct_core.tasks import Task
from training.datasets.shards import BLOCKS, Tally

BLOCK = 512  # bytes of a tar's header
END_OF_TAR = 1024  # bytes of zeros, by which a whole file is told


def _open_files() -> int:
    """How many shards stay open: a quarter of the files that a process may open, on most systems 1,024, on Macs 256."""
    try:
        import resource
    except ImportError:  # on Windows, where none stays open
        return 256
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if allowed == resource.RLIM_INFINITY else max(1, min(256, allowed // 4))


OPEN_FILES = _open_files()


def index_of(path: Path) -> dict[str, list[Any]]:
    """What an index holds of one shard, by a walk through it.

    ``starts`` and ``ends`` of the samples, in bytes; ``kind``, for each of them a place in ``kinds``: a task's name
    and a subject, or None and the reason where a sample's words cannot be read.

    Raises:
        tarfile.TarError, OSError: it is no whole shard.
    """
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    words: dict[str, tuple[str | None, str]] = {}
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            starts.setdefault(key, member.offset)
            ends[key] = member.offset_data + -(-member.size // BLOCK) * BLOCK
            words.setdefault(key, (None, "'json'"))
            if ending == "json":
                opened = archive.extractfile(member)
                assert opened is not None
                words[key] = _words(opened.read())
        file.seek(archive.offset)  # tarfile takes a damaged header in the middle for the end
        if file.read(END_OF_TAR) != bytes(END_OF_TAR):
            raise tarfile.ReadError("it is cut short or damaged")
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(words.values()))}
    kind = [numbers[found] for found in words.values()]
    return {"starts": list(starts.values()), "ends": list(ends.values()), "kinds": list(numbers), "kind": kind}


def _words(text: bytes) -> tuple[str | None, str]:
    try:
        words = json.loads(text)
        return Task(words["task"]).value, words.get("subject", "")
    except (KeyError, TypeError, ValueError) as error:
        return None, str(error)


class Shards:
    """Random access to samples, each read by one call.

    Attributes:
        by_task: places of each task's samples, in order.
    """

    def __init__(self, paths: Sequence[Path], tally: Tally) -> None:
        """Shards with a record, as `build` and `encode` write them, are not opened. What is damaged is counted in
        ``tally``."""
        self.paths = list(paths)
        self.shard, self.about = array("i"), array("i")
        self.start, self.end = array("q"), array("q")
        self.subjects = [""]
        self.by_task: dict[Task, array[int]] = {}
        self._files: dict[int, int] = {}
        numbers, bad = {"": 0}, {}
        for number, path in enumerate(self.paths):
            try:
                self._add(number, recorded(path) or index_of(path), numbers, tally)
            except (tarfile.TarError, OSError) as error:
                bad[_in_dataset(path)] = f"not a whole shard ({error})"
        usual = max(1, len(self) // max(1, len(self.paths) - len(bad)))  # samples of a shard, of which nothing is known
        for name, why in bad.items():
            tally.good(usual)
            tally.lose(name, why, usual)

    def _add(self, number: int, found: dict[str, list[Any]], numbers: dict[str, int], tally: Tally) -> None:
        first, kind = len(self), found["kind"]
        tally.good(len(kind))
        self.start.extend(found["starts"])
        self.end.extend(found["ends"])
        self.shard.extend([number] * len(kind))
        about = []
        for place, (task, subject) in enumerate(found["kinds"]):
            if task is None:
                about.append(0)
                for offset in (offset for offset, own in enumerate(kind) if own == place):
                    tally.lose(self.name(first + offset), f"its words cannot be read ({subject})")
                continue
            if subject not in numbers:
                numbers[subject] = len(self.subjects)
                self.subjects.append(subject)
            about.append(numbers[subject])
        self.about.extend([about[own] for own in kind])
        tasks = [task for task, _ in found["kinds"]]
        for task in dict.fromkeys(tasks):
            if task is not None:
                places = (first + offset for offset, own in enumerate(kind) if tasks[own] == task)
                self.by_task.setdefault(Task(task), array("i")).extend(places)

    def __len__(self) -> int:
        return len(self.start)

    def __getstate__(self) -> dict[str, Any]:  # a loader's worker opens the files itself
        return {**self.__dict__, "_files": {}}

    def subject(self, place: int) -> str:
        """What the object task calls the sample's object; "" where it has no name."""
        return self.subjects[self.about[place]]

    @property
    def readable(self) -> list[int]:
        """Places of the samples whose words can be read, in order."""
        return sorted(place for places in self.by_task.values() for place in places)

    def name(self, place: int) -> str:
        """Where a sample lies, for messages: ``dataset/shard.tar/key``."""
        try:
            key = self.read(place)[0]
        except (ValueError, OSError):
            key = f"byte {self.start[place]}"
        return f"{_in_dataset(self.paths[self.shard[place]])}/{key}"

    def __getitem__(self, place: int) -> dict[str, bytes]:
        """The files of one sample, by their ending. Raises ValueError where they are damaged."""
        return self.read(place)[1]

    def read(self, place: int) -> tuple[str, dict[str, bytes]]:
        """The key of one sample, and its files by their ending. Raises ValueError where they are damaged."""
        key, files = "", {}
        try:
            with tarfile.open(fileobj=io.BytesIO(self._read(place)), mode="r:") as archive:
                for member in archive:
                    key, _, ending = member.name.partition(".")
                    opened = archive.extractfile(member)
                    assert opened is not None
                    files[ending] = opened.read()
        except tarfile.TarError as error:
            raise ValueError(f"its place in the shard is damaged ({error})") from error
        return key, files

    def _read(self, place: int) -> bytes:
        number, start = self.shard[place], self.start[place]
        size = self.end[place] - start
        if not hasattr(os, "pread"):  # Windows
            with open(self.paths[number], "rb") as file:
                file.seek(start)
                return file.read(size)
        if number not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            opened = os.open(self.paths[number], os.O_RDONLY)
            if self._files.setdefault(number, opened) != opened:  # another thread was quicker
                os.close(opened)
        return os.pread(self._files[number], size, start)

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)


def out_of_files(error: Exception) -> bool:
    """Whether the system opens no further file for this process: it would not for any sample, so none is damaged."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def recorded(path: Path) -> dict[str, list[Any]] | None:
    """What the record beside a shard says of it; None where there is none, or the shard is not as long as it says."""
    for beside in (path.with_suffix(".json"), path.parent / BLOCKS / f"{path.stem}.json"):  # of `encode`, of `build`
        try:
            record = json.loads(beside.read_bytes())
            if record["bytes"] == path.stat().st_size:
                return record["index"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _in_dataset(path: Path) -> str:
    """A shard's name with its folder's, since every dataset has a first shard."""
    return f"{path.parent.name}/{path.name}"
