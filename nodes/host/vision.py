"""Pictures -> the image tower's penultimate hidden states, by the host's CLIP vision or an OpenCLIP model."""

from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...ipadapter_instruct_core.config import AdapterConfig
from ...ipadapter_instruct_core.encoders import crop_extremes
from .memory import HostedOpenClip, intermediate, module_dtype


def image_tokens(clip_vision: Any, image: Tensor, config: AdapterConfig) -> tuple[Tensor, Tensor]:
    """Image tokens of pictures, and of no picture.

    Args:
        clip_vision: the host's CLIP_VISION or a `HostedOpenClip`.
        image: [B, H, W, C] in 0-1.

    Returns:
        [B, N, image_width], and [1, N, image_width] of an all-zero preprocessed picture, which is
        neither zero features nor a black photograph.

    Raises:
        ValueError: the tower is not the one that the adapter was trained on.
    """
    pixels = image.movedim(-1, 1)
    pixels = crop_extremes(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3])
    tower = _open_clip_tower if isinstance(clip_vision, HostedOpenClip) else _host_tower
    return tower(clip_vision, pixels.float(), config)


def _open_clip_tower(hosted: HostedOpenClip, pixels: Tensor, config: AdapterConfig) -> tuple[Tensor, Tensor]:
    model = hosted.model
    _check_width(model.image_width, config, hosted.name)
    device = hosted.load()
    ready = model.preprocess(pixels.to(device)).to(module_dtype(model))
    tokens = model.image_tokens(torch.cat([ready, torch.zeros_like(ready[:1])]))
    return intermediate(tokens[:-1]), intermediate(tokens[-1:])


def _host_tower(clip_vision: Any, pixels: Tensor, config: AdapterConfig) -> tuple[Tensor, Tensor]:
    size = clip_vision.image_size
    management.load_model_gpu(clip_vision.patcher)
    zeros = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    zero_tokens = intermediate(clip_vision.model(pixel_values=zeros, intermediate_output=-2)[1])
    _check_width(zero_tokens.shape[-1], config, "this CLIP vision model")
    encoded = clip_vision.encode_image(pixels.movedim(1, -1))
    return intermediate(encoded.penultimate_hidden_states), zero_tokens


def _check_width(width: int, config: AdapterConfig, name: str) -> None:
    if width == config.image_width:
        return
    wanted = "CLIP-ViT-H-14-laion2B-s32B-b79K" if config.image_width == 1280 else "the one it was trained with"
    raise ValueError(
        f"The adapter reads a CLIP vision model that is {config.image_width} wide ({wanted}), but {name} is "
        f"{width} wide; choose {wanted} in Load CLIP Vision."
    )
