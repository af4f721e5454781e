"""The small ControlNet and LoRA in the formats that ComfyUI loads, for the wide UNet of `expand`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from training.miniature.expand.layouts import CHANNEL_COPIES, TEXT_COPIES, State, wide_unet, widen, write_half
from training.miniature.models import weights

HINT_LAYERS = ("conv_in", *(f"blocks.{number}" for number in range(6)), "conv_out")


def wide_controlnet(state: Mapping[str, Tensor]) -> State:
    """The narrow ControlNet (diffusers' keys) at 320 channels and 768 of text, in the original keys."""
    hints = {f"controlnet_cond_embedding.{name}": 2 * number for number, name in enumerate(HINT_LAYERS)}
    wide: State = {}
    for key in [key for key in state if key.startswith("controlnet_")]:
        layer, _, kind = key.rpartition(".")
        if layer in hints:
            outputs = CHANNEL_COPIES if layer.endswith("conv_out") else 1
            wide[f"input_hint_block.{hints[layer]}.{kind}"] = widen(state[key], outputs)
        else:
            number = layer.removeprefix("controlnet_down_blocks.")
            name = "middle_block_out.0" if layer == "controlnet_mid_block" else f"zero_convs.{number}.0"
            wide[f"{name}.{kind}"] = widen(state[key], CHANNEL_COPIES, CHANNEL_COPIES if kind == "weight" else 1)
    wide |= wide_unet({key: tensor for key, tensor in state.items() if not key.startswith("controlnet_")})
    return {f"control_model.{key}": tensor for key, tensor in wide.items()}


def wide_lora(state: Mapping[str, Tensor]) -> State:
    """The narrow LoRA (see `lora.apply`) for the wide UNet, in the keys of kohya's trainer."""
    wide: State = {}
    for key, tensor in state.items():
        layer, _, part = key.rpartition(".")
        name = "lora_unet_" + layer.replace(".", "_")
        if part == "down":
            text = layer.endswith(("attn2.to_k", "attn2.to_v"))
            wide[f"{name}.lora_down.weight"] = widen(tensor, inputs=TEXT_COPIES if text else CHANNEL_COPIES)
            wide[f"{name}.alpha"] = torch.tensor(float(len(tensor)))  # the rank: the update as it is
        else:
            up = widen(tensor, CHANNEL_COPIES)
            wide[f"{name}.lora_up.weight"] = up / CHANNEL_COPIES**0.5 if layer.endswith(".to_q") else up
    return wide


def write_controlnet(folder: Path) -> Path:
    """``controlnet/miniature-scribble.safetensors`` under a folder of models."""
    return write_half(
        wide_controlnet(weights.read("controlnet")), folder / "controlnet" / "miniature-scribble.safetensors"
    )


def write_lora(folder: Path) -> Path:
    """``loras/miniature-STYLE.safetensors``, the style being woodcut as shipped, under a folder of models."""
    state = wide_lora(weights.read("lora"))
    style = json.loads(weights.about("lora")["settings"])["style"]
    return write_half(state, folder / "loras" / f"miniature-{style}.safetensors")
