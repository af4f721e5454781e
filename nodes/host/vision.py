"""Pictures -> the image tower's penultimate hidden states, by the host's CLIP vision or an OpenCLIP model."""

from hashlib import blake2b
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...ipadapter_instruct_core.config import AdapterConfig
from ...ipadapter_instruct_core.encoders import as_rgb, crop_extremes
from .memory import HostedOpenClip, few_at_a_time, intermediate, module_dtype, remembered


def image_tokens(clip_vision: Any, image: Tensor, config: AdapterConfig) -> tuple[Tensor, Tensor]:
    """Image tokens of pictures, and of no picture.

    Args:
        clip_vision: the host's CLIP_VISION or a `HostedOpenClip`.
        image: [B, H, W, C] in 0-1.

    Returns:
        [B, N, image_width], and [1, N, image_width] of an all-zero preprocessed picture, which is
        neither zero features nor a black photograph.

    Raises:
        ValueError: the tower is not the one that the adapter was trained on, or the pictures are none.
    """
    if clip_vision is None:
        raise ValueError("No CLIP vision is connected (the checkpoint holds none); connect Load CLIP Vision.")
    _check_shape(image)
    # As far as it is read: a view, for there may be hundreds.
    pixels = crop_extremes(as_rgb(image.movedim(-1, 1).float()))
    _check_numbers(pixels)
    if isinstance(clip_vision, HostedOpenClip):
        _check_width(clip_vision.model.image_width, config, clip_vision.name)
        encode, encode_zero = _encode_by_open_clip, _encode_zero_by_open_clip
    else:
        encode, encode_zero = _encode_by_host, _encode_zero_by_host
    nothing = remembered(clip_vision, b"", lambda: intermediate(encode_zero(clip_vision)))
    _check_width(nothing.shape[-1], config, "this CLIP vision model")
    digest = blake2b(str(tuple(pixels.shape)).encode())
    for picture in pixels:
        digest.update(picture.contiguous().cpu().numpy())
    tokens = remembered(
        clip_vision, digest.digest(), lambda: few_at_a_time(lambda some: encode(clip_vision, some.contiguous()), pixels)
    )
    return tokens, nothing


def checked_pictures(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, C] that holds pictures.

    Raises:
        ValueError: it holds none, or values that are not numbers.
    """
    _check_shape(image)
    _check_numbers(image)
    return image


def _check_shape(image: Tensor) -> None:
    if image.numel() == 0:
        raise ValueError(f"The image input holds no picture (its shape is {list(image.shape)}); connect at least one.")
    if image.ndim != 4 or image.shape[-1] == 2:
        raise ValueError(
            f"The image input is of shape {list(image.shape)}, not [batch, height, width, channels] with 1, 3 or 4 "
            "channels; connect the IMAGE of a node such as Load Image."
        )


def _check_numbers(pixels: Tensor) -> None:
    if not torch.isfinite(torch.stack(pixels.aminmax())).all():  # NaN comes through; no second tensor of that size
        raise ValueError(
            "The image input holds values that are not numbers (NaN or infinite), as from a VAE that overflowed; "
            "connect another picture, or make this one with the VAE in float32."
        )


def checked_mask(mask: Tensor | None) -> Tensor | None:
    """[M, H, W] in 0-1, of any size and shape: it is stretched over the picture."""
    if mask is None:
        return None
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    if mask.numel() == 0:
        raise ValueError("The mask is empty; connect a mask with at least one pixel, or none.")
    return mask.nan_to_num().clamp(0, 1)


def _encode_by_open_clip(hosted: HostedOpenClip, pixels: Tensor) -> Tensor:
    device = hosted.load()
    return hosted.model.image_tokens(hosted.model.preprocess(pixels.to(device)).to(module_dtype(hosted.model)))


def _encode_zero_by_open_clip(hosted: HostedOpenClip) -> Tensor:
    size = hosted.model.image_size
    return hosted.model.image_tokens(
        torch.zeros(1, 3, size, size, device=hosted.load(), dtype=module_dtype(hosted.model))
    )


def _encode_by_host(clip_vision: Any, pixels: Tensor) -> Tensor:
    return clip_vision.encode_image(pixels.movedim(1, -1)).penultimate_hidden_states


def _encode_zero_by_host(clip_vision: Any) -> Tensor:
    size = clip_vision.image_size
    management.load_model_gpu(clip_vision.patcher)
    zeros = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    return clip_vision.model(pixel_values=zeros, intermediate_output=-2)[1]


def _check_width(width: int, config: AdapterConfig, name: str) -> None:
    if width == config.image_width:
        return
    wanted = "CLIP-ViT-H-14-laion2B-s32B-b79K" if config.image_width == 1280 else "the one it was trained with"
    raise ValueError(
        f"The adapter reads a CLIP vision model that is {config.image_width} wide ({wanted}), but {name} is "
        f"{width} wide; connect {wanted} to clip_vision."
    )
