"""The index by which a folder of generated pictures is read, written one line a picture."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipadapter_instruct_core.tasks import Task

logger = logging.getLogger("ipadapter_instruct")

INDEX = "index.jsonl"


@dataclass(frozen=True)
class Picture:
    """A generated picture: ``{row}/{task}/{index:05d}.jpg`` in its folder, and what it was made from.

    Attributes:
        row: the table's row: which adapter, or set of adapters, made it. Also a folder's name.
        index: the same number is the same condition and prompt in every row.
        condition: path of the condition picture, from the folder or absolute.
    """

    row: str
    task: Task
    index: int
    condition: str
    prompt: str
    instruction: str

    @property
    def name(self) -> str:
        """Its path in the folder."""
        return f"{self.row}/{self.task.value}/{self.index:05d}.jpg"


def write_index_line(folder: Path, picture: Picture) -> None:
    """Add a picture to the index of its folder.

    Raises:
        ValueError: the row's name cannot be a folder's.
    """
    if picture.row.strip() in ("", ".", "..") or any(sign in picture.row for sign in "/\\\n"):
        raise ValueError(f"The row's name {picture.row!r} cannot name a folder; leave out slashes and line breaks.")
    with open(folder / INDEX, "a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(picture), "task": picture.task.value}, ensure_ascii=False) + "\n")


def read_index(folder: Path) -> list[Picture]:
    """The pictures of a folder in the order in which they were made; one that was made again counts once, as last made.

    Raises:
        ValueError: there is no index, or no picture in it.
    """
    pictures = {}
    for line in read_lines(folder / INDEX, "evaluate"):
        try:
            picture = Picture(**{**line, "task": Task(line["task"])})
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / INDEX} is not an index of pictures; run `evaluate` again.") from None
        pictures[picture.name] = picture
    if not pictures:
        raise ValueError(f"{folder / INDEX} names no picture; make some with `python -m training evaluate`.")
    return list(pictures.values())


def read_lines(path: Path, verb: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. A damaged line, as a run leaves it that is killed while it writes, is left out.

    Raises:
        ValueError: there is no such file; ``verb`` names the command that makes it.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # splitlines cuts at U+2028, too
    except OSError:
        raise ValueError(f"There is no file {path}; make it with `python -m training {verb}`.") from None
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError
        except ValueError:
            logger.warning("%s: line %d is damaged and left out.", path, number)
            continue
        yield content
