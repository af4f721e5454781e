"""The weights of a person's ComfyUI that the demo runs on, under whatever names they have there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# Loader → its folder of a ComfyUI `models` folder; each has the file's name as its first widget.
LOADERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "IPAdapterInstructModelLoader": "ipadapter_instruct",
    "CLIPVisionLoader": "clip_vision",
    "IPAdapterInstructOpenCLIPLoader": "clip_vision",
    "ControlNetLoader": "controlnet",
    "LoraLoader": "loras",
}
WEIGHT_FILES = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin"}
TEXT_WIDTH = 768  # of SD1.5's cross-attentions; SDXL's are 2048 wide
CONTEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LATENT_KEY = "model.diffusion_model.input_blocks.0.0.weight"  # 9 channels in an inpainting model
Shapes = dict[str, list[int]]


def needed_files(workflows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """{file name: folder of `models`} of everything that the workflows load."""
    return {
        node["widgets_values"][0]: LOADERS[node["type"]]
        for workflow in workflows
        for node in workflow["nodes"]
        if node["type"] in LOADERS
    }


def real_names(models: Path, needed: dict[str, str]) -> dict[str, str]:
    """For each needed file, the one of a ComfyUI models folder that serves, by the name that the host gives it.

    A file serves under its own name, with or without `fp16` and in any format, in any subfolder. Any other SD1.5
    checkpoint or LoRA will do as well. Raises ValueError with one sentence on all that is missing.
    """
    if not (models / "checkpoints").is_dir():
        inner = f"; did you mean {models / 'models'}?" if (models / "models" / "checkpoints").is_dir() else "."
        raise ValueError(
            f"MODELS must be the `models` folder of a ComfyUI, but {models} has no folder `checkpoints`{inner}"
        )
    found = {name: _find(models / folder, name) for name, folder in needed.items()}
    missing = [f"{_described(name, needed[name])} into {needed[name]}" for name, file in found.items() if file is None]
    if missing:
        raise ValueError(f"Files are missing in {models}: put {_listed(missing)} (README.md says where to get them).")
    return {name: file for name, file in found.items() if file is not None}


def _find(folder: Path, name: str) -> str | None:
    files = sorted(path for path in folder.rglob("*") if path.suffix in WEIGHT_FILES and path.is_file())
    fits = FITTING.get(folder.name)
    choices: list[Callable[[Path], bool]] = [
        lambda path: path.name == name,
        lambda path: _plain(path.name) == _plain(name),
        lambda path: fits is not None and fits(_shapes(path)),
    ]
    for serves in choices:
        for path in files:
            if serves(path):
                return str(path.relative_to(folder))
    return None


def _plain(name: str) -> str:
    """The name without its extension and precision."""
    return re.sub(r"[-_]fp16$", "", Path(name).stem)


def _is_sd15_checkpoint(shapes: Shapes) -> bool:
    return shapes.get(CONTEXT_KEY, [])[1:] == [TEXT_WIDTH] and shapes.get(LATENT_KEY, [])[1:2] == [4]


def _is_sd15_lora(shapes: Shapes) -> bool:
    return any(
        re.search(r"attn2[._]to_k.*(lora_down|lora_A|lora\.down)", key) and shape[1:2] == [TEXT_WIDTH]
        for key, shape in shapes.items()
    )


# Other files that serve, told by the shapes of their weights.
FITTING = {"checkpoints": _is_sd15_checkpoint, "loras": _is_sd15_lora}


def _shapes(path: Path) -> Shapes:
    """Shapes by key, from the header alone; none where the file is not a sound .safetensors."""
    if path.suffix not in {".safetensors", ".sft"}:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return {}


def _described(name: str, folder: str) -> str:
    return {"loras": "any SD1.5 LoRA (.safetensors)", "checkpoints": f"{name} or another SD1.5 checkpoint"}.get(
        folder, name
    )


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
