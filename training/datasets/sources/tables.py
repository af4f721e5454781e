"""Parquet tables of pictures and texts; each row group of pictures is read once, as long as rows are read in order."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

CAPTION_COLUMNS = ("blip2_caption", "caption", "prompt", "text", "title", "description")

_reading = Lock()  # so that threads wait for one row group instead of each reading it


def cell(path: Path, row: int, column: str) -> bytes:
    """The bytes of one encoded picture. Raises ValueError where the cell holds none, OSError where the file is gone."""
    with _reading:
        group = row_group_of(path, row)
        content = _row_group(path, group, column)[row - _row_starts(path)[group]].as_py()
    content = content.get("bytes") if isinstance(content, dict) else content  # datasets keeps {"bytes": …, "path": …}
    if not content:
        raise ValueError("the table holds no bytes of it")
    return content


def row_group_of(path: Path, row: int) -> int:
    """The number of the row group that holds a row."""
    return bisect_right(_row_starts(path), row) - 1


@lru_cache(maxsize=65536)
def _row_starts(path: Path) -> list[int]:
    """The first row of every row group."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return list(accumulate(sizes, initial=0))[:-1]


@lru_cache(maxsize=2)
def _row_group(path: Path, group: int, column: str) -> Any:
    with open_parquet(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def rows(table: Path, picture_column: str, caption_column: str) -> Iterator[tuple[int, str, str]]:
    """(row, column of its picture, caption) of each row; a caption is "" where there is none.

    Raises:
        ValueError: the table or a column is not there.
    """
    with open_parquet(table) as file:
        schema = file.schema_arrow
        pictures = find_column(table, schema, picture_column, "pictures", _holds_pictures, ())
        captions = find_column(table, schema, caption_column, "captions", _holds_text, CAPTION_COLUMNS)
        if pictures is None:
            raise ValueError(f"{table} has no column of pictures; its columns are {', '.join(schema.names)}.")
        row = 0
        for batch in file.iter_batches(columns=[captions] if captions else []):
            for caption in batch.column(0).to_pylist() if captions else [""] * batch.num_rows:
                yield row, pictures, (caption or "").strip()
                row += 1


def texts(path: Path, column: str) -> tuple[str | None, list[str], list[Any]]:
    """(the column that was found, all columns, its texts)."""
    with open_parquet(path) as file:
        found = find_column(path, file.schema_arrow, column, "texts", _holds_text, CAPTION_COLUMNS)
        return found, file.schema_arrow.names, file.read(columns=[found]).column(0).to_pylist() if found else []


def open_parquet(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole parquet file ({error}); get it again.") from error


def _holds_pictures(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return str(kind) in ("binary", "large_binary", "binary_view")


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


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
