"""A tiny ComfyUI checkpoint as a diffusers folder: the same weights for training and for the host."""

from __future__ import annotations

from pathlib import Path

import torch
from tools.tiny_models import checkpoint
from tools.tiny_shapes import CHANNELS, TEXT, UNetLayout
from training.frozen.base import clip_tokenizer


def save_twin(folder: Path, layout: UNetLayout, seed: int) -> Path:
    """`tools.tiny_models.checkpoint(layout, seed)` as a StableDiffusionPipeline's folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    weights = {key: tensor.clone() for key, tensor in checkpoint(layout, seed).items()}
    pipe = StableDiffusionPipeline(
        vae=_autoencoder(_part(weights, "first_stage_model.")),
        text_encoder=_text_encoder(_part(weights, "cond_stage_model.transformer.")),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        unet=_unet(layout, weights, folder),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}


def _unet(layout: UNetLayout, weights: dict[str, torch.Tensor], folder: Path) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if has_transformer else "DownBlock2D" for has_transformer in layout.levels]
    empty = UNet2DConditionModel(
        block_out_channels=(CHANNELS,) * len(layout.levels),
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        mid_block_type="UNetMidBlock2DCrossAttn" if layout.middle else None,
        layers_per_block=layout.blocks,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )
    empty.save_config(folder / "unet")
    return UNet2DConditionModel.from_single_file(weights, config=str(folder), subfolder="unet", local_files_only=True)


def _text_encoder(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=TEXT, intermediate_size=4 * TEXT, num_attention_heads=12, eos_token_id=49407)
    )
    known = encoder.state_dict()
    # The host keeps text encoders in half precision, whatever the file's.
    halved = {key: tensor.half().float() for key, tensor in weights.items()}
    named = {key if key in known else key.removeprefix("text_model."): tensor for key, tensor in halved.items()}
    encoder.load_state_dict(named, strict=True)
    return encoder


def _autoencoder(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A TAESD's layers bear the same numbers in diffusers, where the decoder's first, a clamp, is none."""
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny()
    named = {}
    for key, tensor in weights.items():
        half, _, rest = key.partition(".")
        if half == "taesd_encoder":
            named[f"encoder.layers.{rest}"] = tensor
        elif half == "taesd_decoder":
            number, _, rest = rest.partition(".")
            named[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    model.load_state_dict(named, strict=True)
    return model
