"""Tiny models in true file formats, with random weights: diffusers pipelines, an OpenCLIP, adapters, shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from training.base import clip_tokenizer

WIDTH = 32  # of text states; CLIP's vocabulary makes up most of a tiny text encoder
BLOCKS = (32, 64)


def save_sd15(folder: Path, seed: int = 0, **unet: object) -> Path:
    """A StableDiffusionPipeline folder with five cross-attentions."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(16, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=8,
        ),
        text_encoder=_text_encoder(),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        unet=UNet2DConditionModel(**{**_unet_settings(), "cross_attention_dim": WIDTH, **unet}),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def _unet_settings() -> dict[str, object]:
    return {
        "sample_size": 8,
        "block_out_channels": BLOCKS,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }


def _text_encoder(projection: bool = False) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "patch_size": 8, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 2, "layers": 2},
}


def save_open_clip(folder: Path, seed: int = 1) -> Path:
    """An OpenCLIP model, both towers."""
    from open_clip import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_file(CLIP(**OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    return folder
