"""The files: a models folder for ComfyUI, or a diffusers pipeline for `python -m training`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ipadapter_instruct_core.adapter import INSTRUCT
from torch import Tensor
from training.miniature.expand.extras import write_controlnet, write_lora
from training.miniature.expand.layouts import State, all_words, checkpoint, wide_adapter, write_half
from training.miniature.models import autoencoder, base, clip, weights
from training.miniature.models.base import TextToImage

ADAPTERS = {"adapter": "miniature", "adapter-plain": "miniature-plain"}  # shipped weights: their name in ComfyUI


@dataclass
class ExpandConfig:
    """Attributes:
    out: folder for the models.
    training: write what `python -m training` reads: ``diffusers/``, the narrow base, ``open_clip/``, and the adapters
        that are there, and `adapter-deaf`, to teach anew; in place of a models folder of ComfyUI.
    """

    out: Path = Path("runs/miniature/expanded")
    training: bool = False


def run(config: ExpandConfig) -> None:
    if not config.training:
        print(write_models(config.out))
        return
    print(write_clip(config.out / "open_clip"), write_folder(config.out / "diffusers"), sep="\n")
    print(*write_narrow_adapters(config.out), sep="\n")


def write_models(folder: Path) -> Path:
    """A `models` folder of ComfyUI in half precision: checkpoint, CLIP, both adapters, ControlNet and LoRA.

    Raises:
        FileNotFoundError: weights are missing.
    """
    write_half(checkpoint(base.load(), autoencoder.load()), folder / "checkpoints" / "miniature.safetensors")
    write_clip(folder / "clip_vision")
    write_adapters(folder / "ipadapter_instruct")
    write_controlnet(folder)
    write_lora(folder)
    return folder


def write_adapters(folder: Path) -> None:
    """Both adapters for the wide UNet, saying of themselves what the shipped weights say."""
    for name, file in ADAPTERS.items():
        write_half(wide_adapter(weights.read(name)), folder / f"{file}.safetensors", weights.about(name))


def write_narrow_adapters(folder: Path) -> list[Path]:
    """Those of the adapters that are there, as `python -m training` starts from them; before training there is none.

    With the one that follows instructions comes what is left of it without its instruction layers, an IPAdapter+.
    """
    there = {name: (weights.read(name), weights.about(name)) for name in ADAPTERS if weights.path_of(name).exists()}
    if "adapter" in there:
        state, about = there["adapter"]
        deaf = {key: tensor for key, tensor in state.items() if not key.startswith(INSTRUCT)}
        there["adapter-deaf"] = deaf, {**about, "projector": "ip-adapter-plus"}
    return [write_half(state, folder / f"{name}.safetensors", about) for name, (state, about) in there.items()]


def write_clip(folder: Path) -> Path:
    """The small CLIP as `load_open_clip` and ComfyUI's loader node of ours read it."""
    path = write_half(clip.load().clip.state_dict(), folder / "miniature-clip.safetensors")
    path.with_suffix(".json").write_text(
        json.dumps({"model_cfg": clip.CONFIG, "preprocess_cfg": {}}, indent=2), encoding="utf-8"
    )
    return path


def write_folder(folder: Path, model: TextToImage | None = None, coder: autoencoder.Autoencoder | None = None) -> Path:
    """The narrow model as a diffusers pipeline, for training: its UNet is four times cheaper than the wide one."""
    from diffusers import AutoencoderTiny, DDIMScheduler
    from transformers import CLIPTextModel

    model, coder = model or base.load(), coder or autoencoder.load()
    text = CLIPTextModel(base.text_config())
    text.load_state_dict(all_words(model.text_encoder.state_dict()))
    vae = AutoencoderTiny(scaling_factor=1.0)
    vae.load_state_dict(_diffusers_autoencoder(coder.state_dict()))
    for name, part in {"unet": model.unet, "text_encoder": text, "vae": vae}.items():
        part.save_pretrained(folder / name)
    told = folder / "vae" / "config.json"  # diffusers writes one setting there of which it warns when it reads it
    settings = {
        name: value
        for name, value in json.loads(told.read_text(encoding="utf-8")).items()
        if name != "block_out_channels"
    }
    told.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    DDIMScheduler(**base.SCHEDULE).save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    index = {"_class_name": "StableDiffusionPipeline", **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def _diffusers_autoencoder(state: Mapping[str, Tensor]) -> State:
    """TAESD's keys -> diffusers', whose decoder does not count the clamp as a layer."""
    renamed = {}
    for key, tensor in state.items():
        half, number, rest = key.removeprefix("taesd_").split(".", 2)
        renamed[f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"] = tensor
    return renamed
