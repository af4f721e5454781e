"""What lies in a source's folders: looked into once each, links followed; and what of it is left out, and why."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

LEFT_BY_SYSTEMS = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
NAMED = 100  # of what is left out for one reason
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class LeftOut:
    """Something of a source that gives no sample and is no damage: not downloaded, too small, of another kind."""

    name: str
    why: str


class LeftOutCount:
    """How much was left out for each reason, with some names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, left: LeftOut) -> None:
        self.counts[left.why] += 1
        if len(self.names[left.why]) < NAMED:
            self.names[left.why].append(left.name)

    def taken_from(self, things: Iterable[Thing | LeftOut]) -> Iterator[Thing]:
        """The things without what is left out, which is counted."""
        for thing in things:
            if isinstance(thing, LeftOut):
                self.add(thing)
            else:
                yield thing

    def listed(self) -> list[dict[str, Any]]:
        """As a manifest holds it, the most frequent reason first."""
        return [{"why": why, "count": count, "names": self.names[why]} for why, count in self.counts.most_common()]

    def __str__(self) -> str:
        """``3,120 left out, since there is no such picture in imgs (./003/a.jpg, ./003/b.jpg, …)``; "" for none."""
        told = []
        for why, count in self.counts.most_common():
            named = ", ".join(self.names[why][:3]) + (", …" if count > 3 else "")
            told.append(f"{count:,} left out, since {why} ({named})")
        return "; ".join(told)


class Listing:
    """Which files there are, by one look into each folder: a source may name millions that were not downloaded."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __contains__(self, path: Path) -> bool:
        """Raises ValueError where the folder cannot be looked into."""
        folder, name = os.path.split(path)
        if folder not in self._names:
            try:
                self._names[folder] = {os.path.normcase(name) for name in os.listdir(folder or ".")}
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = set()
            except OSError as error:
                raise ValueError(
                    f"{folder} cannot be looked into ({error.strerror}); see to its permissions."
                ) from None
        return os.path.normcase(name) in self._names[folder]


def missing_from(folder: Path, name: str) -> LeftOut:
    """A picture that an annotation names and that was not downloaded."""
    return LeftOut(name, f"there is no such picture in {folder}")


def inside(folder: Path, name: str) -> Path:
    """A file of a dataset, by the name that an annotation gives it; links that lie in the folder are followed.

    Raises:
        ValueError: the name leads out of the dataset's folder.
    """
    clean = posixpath.normpath(name.replace("\\", "/"))
    if clean.startswith("/") or clean.split("/")[0] == ".." or PureWindowsPath(clean).drive:
        raise ValueError(f"{name} leads out of {folder}; the pictures of a dataset have to lie in its folder.")
    return Path(os.path.join(folder, clean))


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted. Links are followed; hidden files and what systems leave behind are not there.

    Raises:
        ValueError: a folder cannot be looked into.
    """

    def stop(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be looked into ({error.strerror}); see to its permissions.")

    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back, or two links to one folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_belongs, folders))
        found += [Path(here, name) for name in names if _belongs(name)]
    return sorted(found)


def _belongs(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LEFT_BY_SYSTEMS
