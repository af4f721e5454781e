"""Tiny models in true file formats, with random weights: those of `tools.tiny.diffusers_models`, and an SDXL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tools.tiny.diffusers_models import (
    OPEN_CLIP,
    WIDTH,
    autoencoder,
    save_open_clip,
    save_sd15,
    text_encoder,
    unet_settings,
)
from training.frozen.base import clip_tokenizer

__all__ = ["NoAdapter", "OPEN_CLIP", "WIDTH", "save_open_clip", "save_sd15", "save_sdxl"]
WIDTH_2, POOLED = 48, 40  # of SDXL's second encoder


def save_sdxl(folder: Path, seed: int = 0) -> Path:
    """A StableDiffusionXLPipeline folder with eight cross-attentions, two text encoders and a pooled vector."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    sdxl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": WIDTH + WIDTH_2,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    }
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(hidden_size=WIDTH_2, projection_dim=POOLED, hidden_act="gelu"),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        unet=UNet2DConditionModel(**{**unet_settings(), **sdxl}),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


class NoAdapter(torch.nn.Module):
    """Gives no keys and values: the bare base."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *_: torch.Tensor, read: Callable | None = None) -> torch.Tensor | None:
        return None if read is None else read(None)
