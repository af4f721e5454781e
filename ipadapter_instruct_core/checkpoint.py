"""Reading and writing adapter files: the authors' ``.bin``, ``.safetensors``, and what is neither, in plain words."""

import hashlib
import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import Adapter
from .config import AdapterConfig

GROUPS = ("image_proj", "ip_adapter")
EXPECTED = "choose an IPAdapter-Instruct file, or an IPAdapter-Plus file for a baseline"
DOWNLOAD_AGAIN = "The download is incomplete or damaged: download it again."
SAFE_VERSION = "Take the file from its authors' page, or a .safetensors version of it."
SUFFIXES = (".safetensors", ".bin")  # of the files that we write

# (a piece of a key that only this kind of file has, what the file is, what loads it); the first that fits is named.
FOREIGN_FILES = (
    ("lora_", "a LoRA", "a LoRA loader"),
    (".lora.", "a LoRA", "a LoRA loader"),
    ("_lora.", "a LoRA", "a LoRA loader"),
    ("control_model.", "a ControlNet", "Load ControlNet Model"),
    ("input_hint_block.", "a ControlNet", "Load ControlNet Model"),
    ("controlnet_cond_embedding", "a ControlNet", "Load ControlNet Model"),
    ("model.diffusion_model.", "a whole checkpoint", "Load Checkpoint"),
    ("input_blocks.", "a diffusion model", "Load Diffusion Model"),
    ("double_blocks.", "a diffusion model", "Load Diffusion Model"),
    ("visual.conv1.", "an OpenCLIP model", "Load OpenCLIP Model (IPAdapter-Instruct)"),
    ("vision_model.", "a CLIP vision model", "Load CLIP Vision"),
    ("text_model.", "a text encoder", "Load CLIP"),
)


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors, flattened to the released layout's dotted keys, and its metadata.

    Pickles are opened weights-only: code inside is refused, never run.

    Raises:
        ValueError: one sentence on what the file is instead, or what is damaged.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check its name and folder.")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path.name} is empty. {DOWNLOAD_AGAIN}")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        raise ValueError(
            f"{path.name} is a web page (HTML), not weights: the download saved the site's page. "
            "Download the file itself, with the page's download button."
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is a Git LFS pointer of a few bytes, not weights. Run 'git lfs pull' for it.")
    if head.isascii() and head.decode().replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        words = " ".join(head.decode().split())[:40]
        raise ValueError(f"{path.name} is a text ({words!r}), not weights. {DOWNLOAD_AGAIN}")
    return _read_safetensors(path) if _is_safetensors(path, head) else _read_pickle(path, head)


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix.lower() in (".safetensors", ".sft") or head[8:9] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return {key: file.get_tensor(key) for key in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file. {DOWNLOAD_AGAIN}") from error


def _read_pickle(path: Path, head: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with warnings.catch_warnings():  # on a file's kind, which the sentences below tell
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they happen to run into
        raise ValueError(_why_unreadable(path.name, head, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not named weights. {SAFE_VERSION}")
    metadata = content.get("metadata")
    return _flatten(content), {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, Mapping) else {}


def _why_unreadable(name: str, head: bytes, error: Exception) -> str:
    if "TorchScript" in str(error):
        return f"{name} is a TorchScript program, not weights. {SAFE_VERSION}"
    if isinstance(error, pickle.UnpicklingError) and head.startswith(
        (b"PK\x03\x04", b"\x80")
    ):  # a zip or a bare pickle
        return f"{name} holds code besides weights, or is no file of weights, so it was not opened. {SAFE_VERSION}"
    return f"{name} is cut short or damaged, or is no file of weights. {DOWNLOAD_AGAIN}"


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat[prefix + str(key)] = value
        elif isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
    return flat


def load(path: str | os.PathLike, ops: Any = nn) -> Adapter:
    """Read an adapter file strictly: every weight is used, and none is made up.

    Raises:
        ValueError: one sentence on what is wrong with the file, what was expected and what to do.
    """
    path = Path(path)
    state, metadata = read(path)
    _refuse_foreign(path.name, state)
    packed = next((key for key, tensor in state.items() if not tensor.is_floating_point()), None)
    if packed is not None:
        kind = str(state[packed].dtype).removeprefix("torch.")
        raise ValueError(f"{path.name} is compressed ({packed} is {kind}); take the version in float16 or float32.")
    try:
        adapter = Adapter.from_state_dict(state, metadata, ops)
    except ValueError as error:
        raise ValueError(f"{path.name} does not fit the released layout: {error}. {DOWNLOAD_AGAIN}") from error
    check_numbers(path.name, state)
    return adapter


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """What tells one adapter's weights from another's, whatever kind of file they come from."""
    digest = hashlib.sha256()
    for key, tensor in state.items():
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_numbers(name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse weights of which any value is NaN or infinite: one is enough to blacken every picture."""
    for key, tensor in state.items():
        # A sum is not finite if any element is not, and needs no second tensor of the same size.
        if not torch.isfinite(tensor.float().sum()):
            raise ValueError(f"{name} holds values that are not numbers, in {key}. {DOWNLOAD_AGAIN}")


def _refuse_foreign(name: str, state: Mapping[str, Tensor]) -> None:
    keys = "\n".join(state)
    projector = {key.removeprefix("image_proj.") for key in state if key.startswith("image_proj.")}
    if not projector or not any(key.startswith("ip_adapter.") for key in state):
        for piece, what, loader in FOREIGN_FILES:
            if piece in keys:
                raise ValueError(f"{name} is {what}, not an adapter: load it with {loader}; here, {EXPECTED}.")
        raise ValueError(f"{name} is not an adapter: it lacks image_proj or ip_adapter weights; {EXPECTED}.")
    if any("perceiver_resampler" in key for key in projector) or "_lora." in keys:
        raise ValueError(f"{name} is an IPAdapter FaceID file, which reads face embeddings; {EXPECTED}.")
    if "latents" not in projector:
        raise ValueError(f"{name} is an IPAdapter without a resampler (not a Plus version); {EXPECTED}.")


def describe(config: AdapterConfig, **extra: str) -> dict[str, str]:
    """Metadata that a file carries about itself; ``extra`` adds to it (tasks, steps, licence, ...)."""
    projector = "released" if config.reads_prompt else "paper" if config.follows_instructions else "ip-adapter-plus"
    return {
        "format": "pt",
        "architecture": "ip-adapter-instruct",
        "projector": projector,
        "base": config.base.value,
        "instruction_encoder": config.instruction_encoder.value,
        **extra,
    }


def save(path: str | os.PathLike, adapter: Adapter, **extra: str) -> None:
    """Write an adapter as ``.safetensors`` (or ``.bin``) in the released layout, with metadata."""
    write(path, adapter.state_dict(), describe(adapter.config, **extra))


def write(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write flat tensors; the suffix decides on the layout. Written beside and renamed, so never half a file."""
    path = Path(path)
    check_target(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    os.close(handle)
    try:
        if path.suffix.lower() == ".safetensors":
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, temporary, dict(metadata))
            _order_metadata(temporary)
        else:
            nested: dict[str, Any] = {group: {} for group in GROUPS}
            for key, tensor in state.items():
                group, _, name = key.partition(".")
                nested[group][name] = tensor.detach().cpu().clone()
            with open(temporary, "wb") as file:  # by its path, torch would put the temporary name inside
                torch.save(nested | ({"metadata": dict(metadata)} if metadata else {}), file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _order_metadata(path: str) -> None:
    """safetensors writes metadata in an order that changes; the same content is to be the same bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length, "the same pairs in another order"
        file.seek(8)
        file.write(ordered)


def check_target(path: Path) -> None:
    """Whether a file can be written there, told before any work is done for it.

    Raises:
        ValueError: the name's ending is none that we write, or the folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name} is no name for an adapter file; end it in .safetensors or .bin.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} into; make it first.")
