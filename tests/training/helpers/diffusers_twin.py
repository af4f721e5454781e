"""A tiny ComfyUI checkpoint as a diffusers folder: the same weights for training and for the host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tools.tiny.diffusers_models import t5_encoder, t5_tokenizer, text_encoder
from tools.tiny.models import checkpoint, sd3_checkpoint
from tools.tiny.sd3 import BLOCKS, LATENT, LATENT_SCALE, LATENT_SHIFT, POOLED, WIDTH
from tools.tiny.shapes import CHANNELS, TEXT, UNetLayout
from training.frozen.base import clip_tokenizer


def save_twin(folder: Path, layout: UNetLayout, seed: int) -> Path:
    """`tools.tiny.models.checkpoint(layout, seed)` as a StableDiffusionPipeline's folder."""
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


def save_sd3_twin(folder: Path, seed: int) -> Path:
    """`tools.tiny.models.sd3_checkpoint(seed)` as a StableDiffusion3Pipeline's folder; the text encoders that it lacks
    are of other weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from tools.tiny.sd3 import TEXT as T5_WIDTH
    from transformers import CLIPTextModelWithProjection

    weights = {key: tensor.clone() for key, tensor in sd3_checkpoint(seed).items()}
    latents = {"latent_channels": LATENT, "scaling_factor": LATENT_SCALE, "shift_factor": LATENT_SHIFT}
    words = _part(weights, "text_encoders.clip_l.transformer.") | {"text_projection.weight": torch.eye(TEXT)}
    pipe = StableDiffusion3Pipeline(
        vae=_autoencoder(_part(weights, "first_stage_model."), **latents),
        text_encoder=_text_encoder(words, CLIPTextModelWithProjection),
        text_encoder_2=text_encoder(projection_dim=POOLED - TEXT, hidden_act="gelu"),
        text_encoder_3=t5_encoder(T5_WIDTH),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        tokenizer_3=t5_tokenizer(),
        transformer=sd3_transformer(_part(weights, "model.diffusion_model."), folder, BLOCKS, WIDTH),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder)
    return folder


def save_sd35_twin(folder: Path, sd3: Path, seed: int) -> Path:
    """The same of SD3.5, whose other parts are those of an SD3's folder."""
    shutil.copytree(sd3, folder, copy_function=os.link, ignore=shutil.ignore_patterns("transformer"))
    weights = _part(sd3_checkpoint(seed, normed=True), "model.diffusion_model.")
    sd3_transformer(weights, folder, BLOCKS, WIDTH).save_pretrained(folder / "transformer")
    return folder


def sd3_transformer(weights: dict[str, torch.Tensor], folder: Path, blocks: int, width: int) -> torch.nn.Module:
    """diffusers' transformer with the weights of a host's; ``folder`` takes its configuration."""
    from diffusers import SD3Transformer2DModel

    second = [number for number in range(blocks) if f"joint_blocks.{number}.x_block.attn2.qkv.weight" in weights]

    empty = SD3Transformer2DModel(
        num_layers=blocks,
        num_attention_heads=width // 64,
        caption_projection_dim=width,
        joint_attention_dim=weights["context_embedder.weight"].shape[1],
        pooled_projection_dim=weights["y_embedder.mlp.0.weight"].shape[1],
        pos_embed_max_size=round(weights["pos_embed"].shape[1] ** 0.5),
        qk_norm="rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in weights else None,
        dual_attention_layers=tuple(second),
    )
    empty.save_config(folder / "transformer")
    names = {"config": str(folder), "subfolder": "transformer", "local_files_only": True}
    return SD3Transformer2DModel.from_single_file({key: t.clone() for key, t in weights.items()}, **names)


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


def _text_encoder(weights: dict[str, torch.Tensor], kind: type | None = None) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {"hidden_size": TEXT, "intermediate_size": 4 * TEXT, "num_attention_heads": 12, "projection_dim": TEXT}
    encoder = (kind or CLIPTextModel)(CLIPTextConfig(**config, eos_token_id=49407))
    known = encoder.state_dict()
    # The host keeps text encoders in half precision, whatever the file's.
    halved = {key: tensor.half().float() for key, tensor in weights.items()}
    named = {key if key in known else key.removeprefix("text_model."): tensor for key, tensor in halved.items()}
    encoder.load_state_dict(named, strict=True)
    return encoder


def _autoencoder(weights: dict[str, torch.Tensor], **settings: float) -> torch.nn.Module:
    """A TAESD's layers bear the same numbers in diffusers, where the decoder's first, a clamp, is none."""
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(**settings)
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
