"""Checkpoints that are whole or absent: written beside, hashed, renamed; the last good one is found again."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from training.files import sha256, write_json

log = logging.getLogger("ipadapter_instruct")

HASHES = "hashes.json"
STATE = "run.json"
PREFIX = "step-"
WRITERS = ("PytorchStreamWriter", "inline_container")  # what torch's RuntimeError of a failed write names


def path_of(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def save(folder: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int, main: bool) -> None:
    """Save one checkpoint; every rank calls this, ``write`` holds the ranks together.

    Args:
        write: writes the weights and the optimiser's state into a folder, and returns on all ranks when it is whole.
        state: what belongs to the run itself, kept as JSON.
        keep: how many of the newest stay.
        main: whether this rank renames and deletes.

    Raises:
        ValueError: the disk is full; what was saved before is untouched.
    """
    final = path_of(folder, step)
    beside = folder / f".{final.name}"
    try:
        if main:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        write(beside)
        if main:
            write_json(beside / STATE, {"step": step, **state})
            files = sorted(path for path in beside.rglob("*") if path.is_file())
            for path in files:
                _flush(path)
            write_json(beside / HASHES, {path.relative_to(beside).as_posix(): sha256(path) for path in files})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
            _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if main:
            shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in WRITERS):
            raise  # such as memory that ran out
        why = str(error).split("\n")[0]
        raise ValueError(
            f"The checkpoint of step {step} could not be written ({why}); "
            "make room and start again with the same command: it goes on from the last good checkpoint."
        ) from error
    if main:
        # A later one that is there is damaged, or the run would have gone on from it: it keeps no place.
        for old in [path for path in sorted(folder.glob(f"{PREFIX}*")) if path <= final][:-keep]:
            shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Delete what a run that was killed while it saved has left; no other run may be saving there."""
    for left in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file, or what a folder names, on the disk before what follows; Windows opens no folders."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    os.fsync(handle)
    os.close(handle)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there and unchanged."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        return all(sha256(checkpoint / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest(folder: Path) -> Path | None:
    """The last good checkpoint of a run, or None; damaged ones are named in the log and passed over."""
    for checkpoint in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        log.warning("train: %s is damaged and was passed over", checkpoint)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as the run's own state, and the step."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
