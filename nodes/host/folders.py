"""Where adapter files lie, and which of them fit."""

import functools
import itertools
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from safetensors import safe_open

ADAPTERS = "ipadapter_instruct"
REFERENCES = "ipadapter_instruct_references"
SHARED = "ipadapter"  # the popular pack's folder: released files often lie there
OPEN_CLIP_FOLDERS = ("clip_vision", "text_encoders", ADAPTERS)
EXTENSIONS = {".safetensors", ".sft", ".bin", ".pt", ".pth"}
REFERENCE_ENDING = ".safetensors"
LONGEST_NAME = 200  # bytes of what file systems take, with the number and the ending
RESERVED = re.compile(r'[<>:"|?*\x00-\x1f]')  # what Windows takes in no name


def register() -> None:
    """Add our models folders and ``ipadapter``, beside paths that extra_model_paths.yaml
    named, and with the extensions that another pack has set, if any."""
    for folder in (ADAPTERS, SHARED, REFERENCES):
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        paths, extensions = folder_paths.folder_names_and_paths[folder]
        # Without a set of extensions a new folder lists every file in it.
        folder_paths.folder_names_and_paths[folder] = (paths, set(extensions) or EXTENSIONS)


def _files(folder: str) -> list[str]:
    if folder not in folder_paths.folder_names_and_paths:
        return []
    return [name for name in folder_paths.get_filename_list(folder) if Path(name).suffix.lower() in EXTENSIONS]


def adapter_names() -> list[str]:
    """Files of the adapters' folder, then those of the shared folder that hold a resampler."""
    own = _files(ADAPTERS)
    shared = [name for name in _files(SHARED) if name not in own]
    return own + [name for name in shared if _fits(folder_paths.get_full_path(SHARED, name))]


def open_clip_names() -> list[str]:
    """Files that may be whole OpenCLIP models; which are is told when one is loaded."""
    return sorted({name for folder in OPEN_CLIP_FOLDERS for name in _files(folder)})


def adapter_path(name: str) -> str:
    return _find(name, (ADAPTERS, SHARED), "an adapter such as ip-adapter-instruct-sd15.bin")


def open_clip_path(name: str) -> str:
    return _find(name, OPEN_CLIP_FOLDERS, "an OpenCLIP model")


def reference_names() -> list[str]:
    return [name for name in _files(REFERENCES) if name.lower().endswith(REFERENCE_ENDING)]


def reference_path(name: str) -> str:
    if name and not name.lower().endswith(REFERENCE_ENDING):
        raise ValueError(f"{name} is no name of a reference, which ends in {REFERENCE_ENDING}; choose one of the list.")
    return _find(name, (REFERENCES,), "a reference that Save Reference has written")


def new_reference_path(prefix: str) -> Path:
    """A file that does not exist yet, ``prefix`` with a number; a / in the prefix makes a folder.

    Raises:
        ValueError: the prefix is empty or leads out of the folder.
    """
    root = Path(folder_paths.folder_names_and_paths[REFERENCES][0][0])
    wanted = root / prefix.strip().replace("\\", "/")
    inside = Path(os.path.abspath(wanted)).is_relative_to(os.path.abspath(root)) and wanted.name not in ("", "..")
    too_long = max(len(os.fsencode(part)) for part in wanted.parts) > LONGEST_NAME
    if not inside or wanted == root or RESERVED.search(prefix) or too_long:
        raise ValueError(
            f"{prefix[:40]!r} is no name for a file in {root}; take a short name such as oil, or styles/oil."
        )
    wanted.parent.mkdir(parents=True, exist_ok=True)
    taken = {_spelled(path.name) for path in wanted.parent.iterdir()}
    names = (f"{wanted.name}_{number:05d}{REFERENCE_ENDING}" for number in itertools.count(1))
    return wanted.parent / next(name for name in names if _spelled(name) not in taken)


def _spelled(name: str) -> str:
    """Alike for two names that are one on some system: those of other case, or with accents written apart."""
    return unicodedata.normalize("NFC", name).casefold()


def problem(find: Callable[[str], str], name: str | None) -> str:
    """Why a name leads to no file, in a sentence; "" when it does, or when there is no name to look for yet."""
    try:
        if name is not None:
            find(name)
    except ValueError as error:
        return str(error)
    return ""


def _find(name: str, folders: tuple[str, ...], what: str) -> str:
    for folder in folders:
        # Looked up among the listed names only, so no name can lead out of its folder; a graph that was saved on
        # Windows, or is opened there, has other slashes.
        listed = {listed.replace("\\", "/"): listed for listed in _files(folder)}.get(name.replace("\\", "/"))
        if listed:
            path = folder_paths.get_full_path(folder, listed)
            if path:
                return path
    place = folder_paths.folder_names_and_paths[folders[0]][0][0]
    wanted = f"There is no file {name}" if name else "No file is chosen"
    raise ValueError(f"{wanted}; put {what} into {place}, press R to refresh the page, and choose it.")


def fingerprint(find: Callable[[str], str], name: str | None) -> str:
    """Changes when the file does; "" for a name that comes by a link, which the host does not know beforehand."""
    if name is None:
        return ""
    path = find(name)
    status = os.stat(path)
    return f"{path} {status.st_mtime_ns} {status.st_size}"


def _fits(path: str | None) -> bool:
    if path is None:
        return False
    status = os.stat(path)
    return _holds_resampler(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _holds_resampler(path: str, mtime: int, size: int) -> bool:
    """Whether a file of the shared folder is one that we load, told by its keys; its weights are not read."""
    try:
        if path.lower().endswith((".safetensors", ".sft")):
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
        else:
            # torch maps no file of its older format, which is no zip.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            keys = {f"{group}.{key}" for group in ("image_proj", "ip_adapter") for key in content[group]}
    except Exception:  # a damaged or foreign file is simply not offered
        return False
    faceid = any("_lora." in key or "perceiver_resampler" in key for key in keys)
    return "image_proj.latents" in keys and not faceid
