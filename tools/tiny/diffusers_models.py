"""Tiny models in diffusers' and open_clip's folders, as training reads them, with random weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

T5_WIDTH = 72
WIDTH = 32  # of text states; CLIP's vocabulary makes up most of a tiny text encoder
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "patch_size": 8, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 2, "layers": 2},
}
# SD3.5 medium's transformer: normed queries and keys, some blocks with a second attention, heads of their true width.
SD35 = {
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "caption_projection_dim": 64,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1),
}


def save_sd15(folder: Path, seed: int = 0, **unet: object) -> Path:
    """A StableDiffusionPipeline folder with five cross-attentions; ``unet`` changes settings of its UNet."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from training.frozen.base import clip_tokenizer

    torch.manual_seed(seed)
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**noise, clip_sample=False, steps_offset=1)
    rest: dict[str, Any] = {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        unet=UNet2DConditionModel(**{**unet_settings(), "cross_attention_dim": WIDTH, **unet}),
        requires_safety_checker=False,
        **rest,
    )
    pipe.save_pretrained(folder)
    return folder


def save_sd3(folder: Path, seed: int = 0, **transformer: object) -> Path:
    """A StableDiffusion3Pipeline folder with four blocks; ``transformer`` changes settings of its transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from training.frozen.base import clip_tokenizer

    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": 4 * 8,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": 64,
    }
    pipe = StableDiffusion3Pipeline(
        vae=autoencoder(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text_encoder(projection_dim=WIDTH),
        text_encoder_2=text_encoder(projection_dim=WIDTH, hidden_act="gelu"),
        text_encoder_3=t5_encoder(),
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(**{**settings, **transformer}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder)
    return folder


def t5_encoder(width: int = T5_WIDTH) -> Any:
    """T5's encoder with the words of `t5_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=128,
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def t5_tokenizer() -> Any:
    """T5's tokenizer with letters for words."""
    from transformers import T5Tokenizer

    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -1.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,.'-0123456789"]
    return T5Tokenizer(vocab=special + letters, extra_ids=0)


def autoencoder(latent_channels: int = 4, **scaling: Any) -> Any:
    """An AutoencoderKL that makes latents of an eighth of a picture's side."""
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (16, 16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": latent_channels,
        "norm_num_groups": 8,
    }
    return AutoencoderKL(**settings, **scaling)


def unet_settings() -> dict[str, Any]:
    """Settings of a UNet that lack its context's width."""
    return {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }


def text_encoder(**second: Any) -> Any:
    """CLIP-L's kind; with settings of its own, SDXL's second, which projects."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings: dict[str, Any] = {
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


def save_open_clip(folder: Path, seed: int = 1) -> Path:
    """An OpenCLIP model, both towers."""
    from open_clip import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(CLIP(**OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}), encoding="utf-8")
    return folder


def save_ip_adapter_plus(path: Path, base: Path, seed: int = 2) -> Path:
    """An IPAdapter+ in a few thousand weights that fits a tiny SD1.5 or SDXL."""
    from ipadapter_instruct_core.checkpoint import save
    from training.frozen.base import load_base

    loaded = load_base(base)
    save(path, _adapter(loaded, seed, loaded.network.config.cross_attention_dim, reads=None))
    return path


def save_sd3_start(path: Path, base: Path, seed: int = 3) -> Path:
    """An instruct adapter that equals a tiny SD3 or SD3.5 until it is trained."""
    from ipadapter_instruct_core.checkpoint import save
    from training.frozen.base import load_base
    from training.train.adapter import initialise_layers

    loaded = load_base(base)
    adapter = _adapter(loaded, seed, T5_WIDTH, reads=WIDTH)
    initialise_layers(adapter, loaded.network)
    save(path, adapter)
    return path


def _adapter(base: Any, seed: int, output_width: int, reads: int | None) -> Any:
    """A small one with random weights that fits a base; ``reads`` is the width of its instructions and prompts."""
    from ipadapter_instruct_core.adapter import Adapter
    from training.frozen.network import prepare
    from training.train.adapter import SCRATCH

    torch.manual_seed(seed)
    return Adapter(
        replace(
            SCRATCH[base.kind],
            image_width=OPEN_CLIP["vision_cfg"]["width"],
            width=64,
            heads=1,
            depth=2,
            token_count=4,
            output_width=output_width,
            instruction_width=reads,
            prompt_width=reads,
            layers=tuple(prepare(base.network)),
        )
    )
