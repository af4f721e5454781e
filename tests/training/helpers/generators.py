"""Tiny generators of targets: a plain IPAdapter and a scribble ControlNet for a tiny base, with weights that tell."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_base import OPEN_CLIP
from training.frozen.base import load_base
from training.frozen.unet import cross_attentions


def plain_state(base: Path, embedding: int = OPEN_CLIP["embed_dim"], seed: int = 0) -> dict[str, torch.Tensor]:
    """A plain IPAdapter's weights, flat: one CLIP embedding becomes four tokens."""
    unet = load_base(base).network
    width, generator = unet.config.cross_attention_dim, torch.Generator().manual_seed(seed)
    shapes = {"proj.weight": (4 * width, embedding), "proj.bias": (4 * width,), "norm.weight": (width,)}
    state = {f"image_proj.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["image_proj.norm.bias"] = torch.zeros(width)
    for number, out in cross_attentions(unet):
        for kind in ("k", "v"):
            state[f"ip_adapter.{number}.to_{kind}_ip.weight"] = torch.randn(out, width, generator=generator) / 2
    return state


def save_plain(path: Path, base: Path, **settings: int) -> Path:
    save_file(plain_state(base, **settings), path)
    return path


def save_scribble(folder: Path, base: Path) -> Path:
    """An untrained ControlNet's output is zero, so the layers that decide on it are filled."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3)
    for parameter in network.controlnet_cond_embedding.parameters():  # or the edges would hardly be seen
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    network.save_pretrained(folder)
    return folder
