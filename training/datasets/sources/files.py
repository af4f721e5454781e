"""Where pictures and texts lie in a source dataset: files, folders and parquet tables; and how they are kept."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from training.datasets.sample import decode_picture, encode_picture
from training.datasets.sources import tables
from training.datasets.sources.folders import LeftOut, files_in

PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"})
JPEG_START = b"\xff\xd8\xff"
UTF16_STARTS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Place:
    """One encoded picture: a file, or with ``row`` a cell of a parquet file."""

    path: Path
    row: int | None = None
    column: str = ""

    def read(self) -> bytes:
        """Raises ValueError where there is no such picture."""
        try:
            return self.path.read_bytes() if self.row is None else tables.cell(self.path, self.row, self.column)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror or error})") from error

    @property
    def read_with(self) -> str:
        """A name for what is read together with it: a table's row group; "" for a file."""
        return "" if self.row is None else f"{self.path.name}:{tables.row_group_of(self.path, self.row)}"


def existing(path: Path, what: str) -> Path:
    """The path itself; raises ValueError where there is nothing."""
    if not path.exists():
        raise ValueError(f"There is no {path}; {what} is expected there.")
    return path


def read_text(path: Path, what: str) -> str:
    """A whole file in UTF-8, or in UTF-16 as Windows writes it; raises ValueError where there is none."""
    try:
        return existing(path, what).read_text(encoding=_encoding(path))
    except (UnicodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no text file in UTF-8; {what} is expected there.") from error


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in UTF16_STARTS else "utf-8-sig"


def json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSONL file; raises ValueError that names the line that is none."""
    existing(path, what)
    with open(path, encoding=_encoding(path), errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is no JSON object; {what} is expected; mend or remove it.")
            yield number, record


def pictures_in(
    path: Path, picture_column: str = "", caption_column: str = ""
) -> Iterator[tuple[str, Place, str] | LeftOut]:
    """(name, place, caption) of each picture of a parquet file, a folder of them, or a folder of picture files.

    Captions come from a column or from NAME.txt beside NAME.jpg; "" where there is none. A column that is not named
    is found by its type or its usual names. Files of other kinds, and pictures whose caption cannot be read, are told.

    Raises:
        ValueError: there is no such path or column.
    """
    existing(path, "a parquet file, or a folder of parquet files or pictures,")
    files = files_in(path) if path.is_dir() else [path]
    found = [file for file in files if file.suffix.lower() == ".parquet"] if path.is_dir() else files
    if not found:
        yield from _picture_files(path, files)
    for table in found:
        name = table.relative_to(path).as_posix() if path.is_dir() else table.name
        for row, column, caption in tables.rows(table, picture_column, caption_column):
            yield f"{name}:{row}", Place(table, row, column), caption


def _picture_files(folder: Path, files: list[Path]) -> Iterator[tuple[str, Place, str] | LeftOut]:
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    pictures = {file for file in files if file.suffix.lower() in PICTURE_ENDINGS}
    used = {captions.get(file.with_suffix("")) for file in pictures}
    for file in files:
        name = file.relative_to(folder).as_posix()
        if file in pictures:
            beside = captions.get(file.with_suffix(""))
            try:
                yield name, Place(file), read_text(beside, "a caption").strip() if beside else ""
            except ValueError:
                yield LeftOut(name, "the caption beside is no text in UTF-8 or UTF-16; save it as UTF-8")
        elif file not in used:
            ending = f"files that end in {file.suffix.lower()}" if file.suffix else "files without an ending"
            yield LeftOut(name, f"{ending} are not read, but those in {', '.join(sorted(PICTURE_ENDINGS))}")


def texts_in(path: Path, column: str = "") -> list[str]:
    """The texts of a list, blank ones left out: a .txt file's lines, or a column of a .csv, .jsonl or .parquet file.

    Raises:
        ValueError: there is no such file or column, or it holds no text.
    """
    what = "a .txt, .csv, .jsonl or .parquet list of texts"
    existing(path, what)
    if path.suffix == ".parquet":
        found, names, texts = tables.texts(path, column)
    elif path.suffix in (".csv", ".jsonl"):
        if path.suffix == ".csv":
            table = csv.DictReader(io.StringIO(read_text(path, what)))
            names, records = list(table.fieldnames or []), list(table)
        else:
            records = [record for _, record in json_lines(path, what)]
            names = list(records[0]) if records else []
        found = next((name for name in ([column] if column else tables.CAPTION_COLUMNS) if name in names), None)
        texts = [record.get(found) for record in records] if found else []
    else:  # not by splitlines, which cuts at U+2028 and its like, too
        names, found, texts = [], "line", read_text(path, what).split("\n")
    if found is None:
        raise ValueError(
            f"{path} has no column {column or 'of texts'}; its columns are {', '.join(names) or 'none'}, "
            f"and those looked for are {', '.join(tables.CAPTION_COLUMNS)}: name the one to read."
        )
    kept = [str(text).strip() for text in texts if text and str(text).strip()]
    if not kept:
        raise ValueError(f"{path} holds no texts; {what} is expected there.")
    return kept


def shrunk(image: Image.Image, size: int) -> Image.Image:
    """The picture with a short side of at most ``size`` pixels; never enlarged; 0 leaves it as it is."""
    short = min(image.size)
    if not size or short <= size:
        return image
    width, height = (max(1, round(side * size / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def kept(content: bytes, size: int) -> bytes:
    """An encoded picture as it goes into a shard: a JPEG of its `shrunk`, or the same bytes where that is none other.

    Raises:
        ValueError: the bytes are no whole picture.
    """
    image = decode_picture(content)
    if not size or (min(image.size) <= size and content.startswith(JPEG_START)):
        return content
    return encode_picture(shrunk(image, size))
