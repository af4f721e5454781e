"""Diffusers pipelines as single-file checkpoints, in the key layout of the original repositories."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_AUTOENCODER = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "samplers.0.conv": "sample.conv",
    "resnets": "block",
    "down_blocks": "down",
}
_OPEN_CLIP = {
    "text_model.": "",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "final_layer_norm": "ln_final",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def unet_key(name: str, blocks: int, crossed: tuple[bool, ...]) -> str:
    """A UNet's diffusers key -> the original one.

    Args:
        blocks: residual blocks a level, on the way down.
        crossed: for each level on the way up, whether its blocks hold a transformer.
    """
    found = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    if not found:
        return _renamed(name, _UNET_ENDS)
    side, level, kind, place, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = _renamed(rest, _RESIDUAL_BLOCK)
    if side == "mid":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (blocks + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (blocks + 1) + blocks}.{1 + crossed[level]}.{rest}"
    first = 1 + level * (blocks + 1) if side == "down" else level * (blocks + 1)
    return f"{'in' if side == 'down' else 'out'}put_blocks.{first + place}.{int(kind == 'attentions')}.{rest}"


def unet_state(unet: torch.nn.Module) -> dict[str, Tensor]:
    config = unet.config
    crossed = tuple("CrossAttn" in kind for kind in config.up_block_types)
    return {unet_key(name, config.layers_per_block, crossed): tensor for name, tensor in unet.state_dict().items()}


def autoencoder_state(vae: torch.nn.Module) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    state = {}
    for name, tensor in vae.state_dict().items():
        key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", _renamed(name, _AUTOENCODER))
        linear = "attn_1" in key and tensor.ndim == 2
        state[key] = tensor[:, :, None, None] if linear else tensor  # convolutions of one pixel, originally
    return state


def open_clip_state(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """A transformers text tower with a projection -> OpenCLIP's layout, which has one matrix for q, k and v."""
    state, parts = {}, encoder.state_dict()
    for name, tensor in parts.items():
        key = _renamed(name, _OPEN_CLIP)
        if name == "text_projection.weight":
            state["text_projection"] = tensor.T.contiguous()
        elif ".q_proj." in name:
            parted = [parts[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            state[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parted)
        elif not re.search(r"\.[kv]_proj\.", name):
            state[key] = tensor
    return state


def clip_state(encoder: torch.nn.Module) -> dict[str, Tensor]:
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in encoder.state_dict().items()}
    return {**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def checkpoint(pipe: object) -> dict[str, Tensor]:
    """A whole SD1.5- or SDXL-like pipeline as one state dict."""
    parts = {"model.diffusion_model.": unet_state(pipe.unet), "first_stage_model.": autoencoder_state(pipe.vae)}
    if getattr(pipe, "text_encoder_2", None) is None:
        parts["cond_stage_model.transformer."] = clip_state(pipe.text_encoder)
    else:
        parts["conditioner.embedders.0.transformer."] = clip_state(pipe.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_state(pipe.text_encoder_2)
    return {prefix + key: tensor.contiguous() for prefix, part in parts.items() for key, tensor in part.items()}


def save_single_file(path: Path, pipe: object, dtype: torch.dtype = torch.float32) -> Path:
    from safetensors.torch import save_file

    state = checkpoint(pipe).items()
    save_file({key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state}, path)
    return path
