"""Tiny models in true file formats, with random weights: diffusers pipelines, an OpenCLIP, adapters, shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from training.base import clip_tokenizer

WIDTH = 32  # of text states; CLIP's vocabulary makes up most of a tiny text encoder
WIDTH_2, POOLED = 48, 40  # of SDXL's second encoder
BLOCKS = (32, 64)


def save_sd15(folder: Path, seed: int = 0, **unet: object) -> Path:
    """A StableDiffusionPipeline folder with five cross-attentions."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=_text_encoder(),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        unet=UNet2DConditionModel(**{**_unet_settings(), "cross_attention_dim": WIDTH, **unet}),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, seed: int = 0) -> Path:
    """A StableDiffusionXLPipeline folder with ten cross-attentions, two text encoders and a pooled vector."""
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
        vae=_autoencoder(),
        text_encoder=_text_encoder(),
        text_encoder_2=_text_encoder(hidden_size=WIDTH_2, projection_dim=POOLED, hidden_act="gelu"),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        unet=UNet2DConditionModel(**{**_unet_settings(), **sdxl}),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def _autoencoder() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )


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


def _text_encoder(**second: object) -> torch.nn.Module:
    """CLIP-L's kind; with settings of its own, SDXL's second, which projects."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = {
        "vocab_size": 49408,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(CLIPTextConfig(**settings | second))


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
