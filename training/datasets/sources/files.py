"""Where pictures and texts lie in a source dataset: files, folders and parquet tables; and how they are kept."""

import csv
import io
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image
from training.datasets.sample import decode_picture, encode_picture

PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
CAPTION_COLUMNS = ("blip2_caption", "caption", "prompt", "text", "title", "description")
JPEG_START = b"\xff\xd8\xff"

_reading = Lock()  # so that threads wait for one row group instead of each reading it


@dataclass(frozen=True)
class Place:
    """One encoded picture: a file, or with ``row`` a cell of a parquet file."""

    path: Path
    row: int | None = None
    column: str = ""

    def read(self) -> bytes:
        """Raises ValueError where there is no such picture."""
        try:
            return self.path.read_bytes() if self.row is None else self._cell()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror or error})") from error

    def _cell(self) -> bytes:
        with _reading:
            starts = _row_starts(self.path)
            group = bisect_right(starts, self.row) - 1
            cell = _row_group(self.path, group, self.column)[self.row - starts[group]].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell  # datasets keeps {"bytes": ..., "path": ...}
        if not content:
            raise ValueError("the table holds no bytes of it")
        return content


@lru_cache(maxsize=256)
def _row_starts(path: Path) -> list[int]:
    """The first row of every row group."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return list(accumulate(sizes, initial=0))[:-1]


@lru_cache(maxsize=2)
def _row_group(path: Path, group: int, column: str) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def existing(path: Path, what: str) -> Path:
    """The path itself; raises ValueError where there is nothing."""
    if not path.exists():
        raise ValueError(f"There is no {path}; {what} is expected there.")
    return path


def read_text(path: Path, what: str) -> str:
    """A whole UTF-8 file; raises ValueError where there is none."""
    try:
        return existing(path, what).read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no text file; {what} is expected there.") from error


def json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSONL file; raises ValueError that names the line that is none."""
    existing(path, what)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
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


def inside(folder: Path, name: str) -> Path:
    """A file of a dataset; raises ValueError for a path that leaves the dataset's folder."""
    path = os.path.join(folder, name)
    real = os.path.realpath(path) if os.path.islink(path) else _real(os.path.dirname(path))
    root = _real(str(folder)).rstrip(os.sep)
    if not f"{real}{os.sep}".startswith(f"{root}{os.sep}"):
        raise ValueError(f"{name} leads out of {folder}; the pictures of a dataset have to lie in its folder.")
    return Path(path)


@lru_cache(maxsize=65536)  # millions of pictures lie in few folders
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def pictures_in(path: Path, picture_column: str = "", caption_column: str = "") -> Iterator[tuple[str, Place, str]]:
    """(name, place, caption) of each picture of a parquet file, a folder of them, or a folder of picture files.

    Captions come from a column or from NAME.txt beside NAME.jpg; "" where there is none. A column that is not named
    is found by its type or its usual names.

    Raises:
        ValueError: there is no such path or column.
    """
    existing(path, "a parquet file, or a folder of parquet files or pictures,")
    tables = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    for table in tables:
        name = table.relative_to(path).as_posix() if path.is_dir() else table.name
        yield from _rows(table, name, picture_column, caption_column)
    if tables:
        return
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in PICTURE_ENDINGS:
            beside = file.with_suffix(".txt")
            caption = read_text(beside, "a caption").strip() if beside.exists() else ""
            yield file.relative_to(path).as_posix(), Place(file), caption


def _rows(table: Path, name: str, picture_column: str, caption_column: str) -> Iterator[tuple[str, Place, str]]:
    with _open_parquet(table) as file:
        schema = file.schema_arrow
        pictures = find_column(table, schema, picture_column, "pictures", _holds_pictures, ())
        captions = find_column(table, schema, caption_column, "captions", _holds_text, CAPTION_COLUMNS)
        if pictures is None:
            raise ValueError(f"{table} has no column of pictures; its columns are {', '.join(schema.names)}.")
        row = 0
        for batch in file.iter_batches(columns=[captions] if captions else []):
            for caption in batch.column(0).to_pylist() if captions else [""] * batch.num_rows:
                yield f"{name}:{row}", Place(table, row, pictures), (caption or "").strip()
                row += 1


def _open_parquet(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole parquet file ({error}); get it again.") from error


def _holds_pictures(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def find_column(
    path: Path, schema: Any, wanted: str, what: str, fits: Callable[[Any], bool], usual: Sequence[str]
) -> str | None:
    """The column ``wanted``, or else one that fits: by its usual names, or without these the first by its type.

    Raises:
        ValueError: the wanted column is not there or does not hold ``what``.
    """
    fitting = [field.name for field in schema if fits(field.type)]
    if wanted and wanted not in fitting:
        raise ValueError(f"{path} has no column {wanted} that holds {what}; its columns are {', '.join(schema.names)}.")
    if wanted:
        return wanted
    return next((name for name in (usual or fitting) if name in fitting), None)


def texts_in(path: Path, column: str = "") -> list[str]:
    """The texts of a list, blank ones left out: a .txt file's lines, or a column of a .csv, .jsonl or .parquet file.

    Raises:
        ValueError: there is no such file or column, or it holds no text.
    """
    what = "a .txt, .csv, .jsonl or .parquet list of texts"
    existing(path, what)
    if path.suffix == ".parquet":
        with _open_parquet(path) as file:
            found = find_column(path, file.schema_arrow, column, "texts", _holds_text, CAPTION_COLUMNS)
            names = file.schema_arrow.names
            texts = file.read(columns=[found]).column(0).to_pylist() if found else []
    elif path.suffix in (".csv", ".jsonl"):
        if path.suffix == ".csv":
            table = csv.DictReader(io.StringIO(read_text(path, what)))
            names, records = list(table.fieldnames or []), list(table)
        else:
            records = [record for _, record in json_lines(path, what)]
            names = list(records[0]) if records else []
        found = next((name for name in ([column] if column else CAPTION_COLUMNS) if name in names), None)
        texts = [record.get(found) for record in records] if found else []
    else:
        names, found, texts = [], "line", read_text(path, what).splitlines()
    if found is None:
        raise ValueError(
            f"{path} has no column {column or 'of texts'}; its columns are {', '.join(names) or 'none'}, "
            f"and those looked for are {', '.join(CAPTION_COLUMNS)}: name the one to read."
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
