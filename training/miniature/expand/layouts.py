"""The miniature in other people's formats: an SD1.5 checkpoint for ComfyUI, and a diffusers folder for training.

A network whose every channel is repeated (c -> c, c), each copy sending on its share, computes the very same: norms
see the same statistics, and products of queries and keys, which grow with the copies, are scaled back. The UNet's
channels are doubled (160 -> 320), the text's quadrupled (192 -> 768); the autoencoder has TAESD's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from ipadapter_instruct_core import checkpoint as checkpoint_file
from torch import Tensor
from training.miniature.models import autoencoder
from training.miniature.models.base import TEXT_LAYERS, TextToImage
from training.miniature.world.words import END, vocabulary

CHANNEL_COPIES, TEXT_COPIES = 2, 4
CLIP_L_LAYERS = 12
LATENT_SCALE = 0.18215  # SD1.5's, by which hosts multiply what an autoencoder gives them
State = dict[str, Tensor]

# diffusers' names of the UNet's parts -> those of the original layout.
UNET_PARTS = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
RESIDUAL_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def widen(weight: Tensor, outputs: int = 1, inputs: int = 1) -> Tensor:
    """Repeat each output (dimension 0) and each input (dimension 1) of a layer, so that it computes the same."""
    if inputs > 1:
        weight = weight.repeat_interleave(inputs, dim=1) / inputs
    return weight.repeat_interleave(outputs, dim=0)


def wide_unet(state: Mapping[str, Tensor]) -> State:
    """The narrow UNet (diffusers' keys, 160 channels, 192 of text) at 320 and 768, in the original keys."""
    wide: State = {}
    for key, tensor in state.items():
        copies = 1 if key.startswith("conv_out.") else CHANNEL_COPIES
        if tensor.ndim == 1:
            wide[_original_key(key)] = tensor.repeat_interleave(copies)
        elif key == "time_embedding.linear_1.weight":
            # Twice as many waves of time: every other one is one of ours.
            spread = tensor.new_zeros(tensor.shape[0], 2 * tensor.shape[1])
            spread[:, ::2] = tensor
            wide[_original_key(key)] = widen(spread, copies)
        else:
            inputs = 1 if key == "conv_in.weight" else CHANNEL_COPIES
            text = re.search(r"attn2\.to_[kv]\.", key)
            weight = widen(tensor, copies, TEXT_COPIES if text else inputs)
            wide[_original_key(key)] = weight / CHANNEL_COPIES**0.5 if ".to_q." in key else weight
    return wide


def _original_key(key: str) -> str:
    part = next(part for part in UNET_PARTS if key.startswith(part + "."))
    rest = key[len(part) + 1 :]
    if "resnets" in part:
        inner, _, ending = rest.rpartition(".")
        rest = f"{RESIDUAL_PARTS[inner]}.{ending}"
    return f"{UNET_PARTS[part]}.{rest}"


def all_words(state: Mapping[str, Tensor]) -> State:
    """The text encoder with a row for every token of CLIP's; words that captions do not use are zeros."""
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    words = state[key].new_zeros(END + 1, state[key].shape[1])
    words[list(vocabulary())] = state[key]
    return {**state, key: words}


def wide_text(state: Mapping[str, Tensor]) -> State:
    """The narrow text encoder as CLIP-L's, 768 wide; the layers that it lacks are there and do nothing."""
    wide: State = {}
    for key, tensor in all_words(state).items():
        name = "text_model." + key.removeprefix("text_model.")
        if "embedding." in key:
            wide[name] = tensor.repeat_interleave(TEXT_COPIES, dim=1)
        elif tensor.ndim == 1:
            wide[name] = tensor.repeat_interleave(TEXT_COPIES)
        else:
            wide[name] = widen(tensor, TEXT_COPIES, TEXT_COPIES)
        if ".q_proj." in key:
            wide[name] = wide[name] / TEXT_COPIES**0.5
    first = {key: tensor for key, tensor in wide.items() if ".layers.0." in key}
    for number in range(TEXT_LAYERS, CLIP_L_LAYERS):
        wide |= {key.replace(".layers.0.", f".layers.{number}."): torch.zeros_like(t) for key, t in first.items()}
    return wide


def wide_adapter(state: Mapping[str, Tensor]) -> State:
    """An adapter of the narrow UNet (flat keys of the released layout) as one of the wide: tokens of 768."""
    wide: State = {}
    for key, tensor in state.items():
        name = key.removeprefix("image_proj.")
        if key.startswith("ip_adapter."):
            wide[key] = widen(tensor, CHANNEL_COPIES, TEXT_COPIES)
        elif name.startswith(("proj_out.", "norm_out.")):
            wide[key] = tensor.repeat_interleave(TEXT_COPIES, dim=0)
        else:
            wide[key] = widen(tensor, 1, TEXT_COPIES) if name == "proj_prompt_input.weight" else tensor
    return wide


def checkpoint(model: TextToImage, coder: autoencoder.Autoencoder) -> State:
    """The whole SD1.5 checkpoint, with the keys that ComfyUI reads, in single precision."""
    vae = {**coder.state_dict(), "vae_scale": torch.tensor(LATENT_SCALE), "vae_shift": torch.tensor(0.0)}
    parts = {
        "model.diffusion_model.": wide_unet(model.unet.state_dict()),
        "cond_stage_model.transformer.": wide_text(model.text_encoder.state_dict()),
        "first_stage_model.": vae,
    }
    return {prefix + key: tensor for prefix, state in parts.items() for key, tensor in state.items()}


def write_half(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] = {}) -> Path:
    """Weights as a file in half precision; single numbers, such as a LoRA's alpha, stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_file.write(path, {key: t if t.ndim == 0 else t.half() for key, t in state.items()}, metadata)
    return path
