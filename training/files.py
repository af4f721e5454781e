"""Files that are whole or absent, and how many processes share the work."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a reader never meets half a file, not even after a power cut."""
    beside = name_beside(path)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """Where a file is written before it has its name; no other process has the same, in other containers either."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as `accelerate launch` and torchrun tell it.

    Raises:
        ValueError: the number is none of these, so that one's share would never be done.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(
            f"RANK is {rank}, but with WORLD_SIZE {world} ranks count from 0 to {world - 1}; number them so, as "
            f"Slurm's --array=0-{world - 1} does."
        )
    return rank, world


def remove_leftovers(path: Path) -> None:
    """Delete what killed runs were writing beside a file that no other process is writing now."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    write_atomically(path, (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())
