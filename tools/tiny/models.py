"""Tiny models with SD1.5's full shapes and random weights, in a ComfyUI `models` folder.

Their pictures mean nothing, yet ComfyUI's own loaders, samplers and patches run on them as on real ones. The denoiser
is random *around the identity*: it predicts its own input as noise, plus something that depends on the prompt, the
adapter and the controls, so that samples stay finite and in range at any number of steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import sd3
from .adapter_shapes import key_value_shapes, projector_shapes
from .shapes import (
    CHANNELS,
    FULL_UNET,
    MIN_UNET,
    UNetLayout,
    clip_text_shapes,
    clip_vision_shapes,
    controlnet_shapes,
    open_clip_shapes,
    taesd_shapes,
    unet_shapes,
)
from .strided_weights import strided_weights

# The files that our workflows name → the tiny ones that stand in for them. Shared buffers need torch.save, and
# ComfyUI chooses the reader by the file's extension, so most cannot bear the real name.
TINY_NAMES = {
    "v1-5-pruned-emaonly-fp16.safetensors": "tiny-sd15.ckpt",
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": "tiny-CLIP-ViT-H-14.bin",
    "control_v11p_sd15_scribble_fp16.safetensors": "tiny-scribble.pth",
    "control_v11p_sd15_openpose_fp16.safetensors": "tiny-openpose.pth",
    "pixel_art_style_sd15.safetensors": "pixel_art_style_sd15.safetensors",
    "ip-adapter-instruct-sd15.bin": "ip-adapter-instruct-sd15.bin",
    "my_adapter.safetensors": "tiny-own.bin",
    "ip-adapter-plus_sd15.safetensors": "tiny-plus.bin",
    "open_clip_model.safetensors": "tiny-open-clip.bin",
    "sd3_medium_incl_clips_t5xxlfp8.safetensors": "tiny-sd3.ckpt",
    "sd3_controlnet_canny.safetensors": "tiny-sd3-canny.pth",
    "ip-adapter-instruct-sd3.bin": "ip-adapter-instruct-sd3.bin",
}
# Quicker ones for tests: a UNet of one level with three cross-attentions, and adapters that fit it.
MIN_CHECKPOINT = "tiny-sd15-min.ckpt"
MIN_ADAPTER = "tiny-instruct-min.bin"
MIN_PAPER_ADAPTER = "tiny-instruct-paper-min.bin"
# SD3.5, for which nobody has published an adapter.
SD35_CHECKPOINT, SD35_ADAPTER = "tiny-sd35.ckpt", "tiny-instruct-sd35.bin"

ADAPTER_WIDTH = 768
OPEN_CLIP_WIDTH, OPEN_CLIP_LAYERS, OPEN_CLIP_SIZE, OPEN_CLIP_PATCH = 64, 2, 224, 28
# Both checkpoints have the same autoencoder and text encoder, as real ones do. Of random decoders many are saturated
# by their own activations' mean; this one spreads around mid-grey.
VAE_SEED, CLIP_SEED = 1002, 2002
LATENT_SCALE = 0.18215  # SD1.5's; a TAESD works on scaled latents


def make_tiny_models(models: Path) -> Path:
    """Write every tiny model into a ComfyUI models folder (made where missing), a few MB in all; returns it."""
    _save(models / "checkpoints" / TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"], checkpoint(FULL_UNET, seed=1))
    _save(models / "checkpoints" / MIN_CHECKPOINT, checkpoint(MIN_UNET, seed=2))
    vision = strided_weights(clip_vision_shapes(), clip_gain, seed=3)
    vision["vision_model.embeddings.class_embedding"] = torch.randn(1280, generator=torch.Generator().manual_seed(3))
    _save(models / "clip_vision" / TINY_NAMES["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"], vision)
    for seed, kind in enumerate(("scribble", "openpose"), start=4):
        name = TINY_NAMES[f"control_v11p_sd15_{kind}_fp16.safetensors"]
        _save(models / "controlnet" / name, strided_weights(controlnet_shapes(FULL_UNET), unet_gain, seed))
    adapters = models / "ipadapter_instruct"
    _save(adapters / TINY_NAMES["ip-adapter-instruct-sd15.bin"], adapter(FULL_UNET, seed=6))
    _save(adapters / MIN_ADAPTER, adapter(MIN_UNET, seed=7))
    _save(adapters / MIN_PAPER_ADAPTER, adapter(MIN_UNET, seed=8, prompt_layers=False))
    _save(models / "checkpoints" / TINY_NAMES["sd3_medium_incl_clips_t5xxlfp8.safetensors"], sd3_checkpoint(seed=13))
    _save(models / "controlnet" / TINY_NAMES["sd3_controlnet_canny.safetensors"], sd3.controlnet(seed=14))
    _save(adapters / TINY_NAMES["ip-adapter-instruct-sd3.bin"], sd3.adapter(seed=15))
    _save(models / "checkpoints" / SD35_CHECKPOINT, sd3_checkpoint(seed=13, normed=True))
    _save(adapters / SD35_ADAPTER, sd3.adapter(seed=16, normed=True))
    own = {"prompt_layers": False, "image": OPEN_CLIP_WIDTH}
    for seed, name, width in ((10, "my_adapter", OPEN_CLIP_WIDTH), (11, "ip-adapter-plus_sd15", None)):
        _save(adapters / TINY_NAMES[f"{name}.safetensors"], adapter(FULL_UNET, seed, **own, instruction=width))
    _save_open_clip(models / "clip_vision" / TINY_NAMES["open_clip_model.safetensors"], seed=12)
    (models / "loras").mkdir(parents=True, exist_ok=True)
    save_file(lora(seed=9), models / "loras" / TINY_NAMES["pixel_art_style_sd15.safetensors"])
    return models


def with_tiny_names(graph: Any) -> Any:
    """A copy of a workflow or graph, of either format, that names the tiny files where it named the real ones."""
    if isinstance(graph, dict):
        return {key: with_tiny_names(value) for key, value in graph.items()}
    if isinstance(graph, list):
        return [with_tiny_names(value) for value in graph]
    return TINY_NAMES.get(graph, graph) if isinstance(graph, str) else graph


def checkpoint(layout: UNetLayout, seed: int) -> dict[str, torch.Tensor]:
    """An SD1.5 checkpoint: UNet, CLIP-L and a TAESD."""
    unet = strided_weights(unet_shapes(layout), unet_gain, seed)
    _add_identity_path(unet, seed)
    return _whole(unet, "cond_stage_model.transformer.", taesd(4, LATENT_SCALE, 0.0))


def sd3_checkpoint(seed: int, normed: bool = False) -> dict[str, torch.Tensor]:
    """An SD3 checkpoint: transformer, CLIP-L alone of its three text encoders, and a TAESD of 16 channels; or, with
    ``normed`` queries and keys, an SD3.5 one."""
    vae = taesd(sd3.LATENT, sd3.LATENT_SCALE, sd3.LATENT_SHIFT)
    return _whole(sd3.transformer(seed, normed), "text_encoders.clip_l.transformer.", vae)


def taesd(latent: int, scale: float, shift: float) -> dict[str, torch.Tensor]:
    return strided_weights(taesd_shapes(latent), vae_gain, VAE_SEED) | {
        "vae_scale": torch.tensor(scale),
        "vae_shift": torch.tensor(shift),
        "taesd_decoder.19.bias": torch.full((3,), 0.5),  # mid-grey
    }


def _whole(network: dict, text_prefix: str, vae: dict) -> dict[str, torch.Tensor]:
    clip = strided_weights(clip_text_shapes(), clip_gain, CLIP_SEED)
    return {
        **{f"model.diffusion_model.{key}": value for key, value in network.items()},
        **{f"{text_prefix}{key}": value for key, value in clip.items()},
        **{f"first_stage_model.{key}": value for key, value in vae.items()},
    }


def _add_identity_path(unet: dict[str, torch.Tensor], seed: int) -> None:
    """Let the noisy latent through: first convolution → last skip connection → last convolution.

    Channels carry ±latent in pairs, since silu(a) − silu(−a) = a undoes the last activation exactly. The skip
    connection reverses the channels' order, for a reversed identity is a view of one short buffer.
    """
    generator = torch.Generator().manual_seed(seed)
    channel = torch.arange(CHANNELS)
    latent, sign = (channel // 2) % 4, 1.0 - 2.0 * (channel % 2)
    first = torch.randn(CHANNELS, 4, 3, 3, generator=generator) * 0.1
    first[channel, latent, 1, 1] += sign
    last = torch.randn(4, CHANNELS, 3, 3, generator=generator) * 0.3 / (9 * CHANNELS) ** 0.5
    reversed_channel = CHANNELS - 1 - channel
    last[latent[reversed_channel], channel, 1, 1] += sign[reversed_channel] * 8 / CHANNELS
    skip = torch.randn(3 * CHANNELS, generator=generator) * 0.3 / (2 * CHANNELS) ** 0.5
    skip[2 * CHANNELS - 1] = 1.0
    final_block = max(int(key.split(".")[1]) for key in unet if key.startswith("output_blocks."))
    unet["input_blocks.0.0.weight"] = first
    unet["out.2.weight"] = last
    skip_key = f"output_blocks.{final_block}.0.skip_connection.weight"
    unet[skip_key] = torch.as_strided(skip, (CHANNELS, 2 * CHANNELS, 1, 1), (1, 1, 1, 1))


def adapter(layout: UNetLayout, seed: int, **reads: Any) -> dict[str, dict[str, torch.Tensor]]:
    """A released-layout adapter for a UNet: {"image_proj": …, "ip_adapter": …}; ``reads`` as `projector_shapes`."""
    return {
        "image_proj": strided_weights(projector_shapes(ADAPTER_WIDTH, **reads), adapter_gain, seed),
        "ip_adapter": strided_weights(key_value_shapes(layout), adapter_gain, seed + 1000),
    }


def lora(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA in the common trainer's key style, on three UNet layers and one text layer."""
    generator = torch.Generator().manual_seed(seed)
    unet = "lora_unet_{}_attentions_0_transformer_blocks_0_{}"
    layers = {
        unet.format("down_blocks_0", "attn2_to_v"): (CHANNELS, 768),
        unet.format("up_blocks_3", "attn2_to_v"): (CHANNELS, 768),
        unet.format("up_blocks_3", "attn1_to_out_0"): (CHANNELS, CHANNELS),
        "lora_te_text_model_encoder_layers_11_mlp_fc2": (768, 3072),
    }
    weights = {}
    for name, (out, inner) in layers.items():
        weights[f"{name}.lora_down.weight"] = torch.randn(rank, inner, generator=generator) / inner**0.5
        weights[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        weights[f"{name}.alpha"] = torch.tensor(float(rank))
    return weights


def unet_gain(key: str) -> float:
    """Text matters as much as position; the residual branches add a little each."""
    if "attn2.to_out" in key:
        return 2.0
    return 0.5 if "out_layers.3" in key or "ff.net.2" in key else 1.0


def clip_gain(key: str) -> float:
    return 0.3 if "position_embedding" in key else 1.0


def vae_gain(key: str) -> float:
    """ReLU halves the variance; the residual branches and the pixels stay small."""
    if key.startswith("taesd_decoder.19."):
        return 0.2
    return 0.5 if key.endswith("conv.4.weight") else 1.4


def adapter_gain(key: str) -> float:
    """The picture, the instruction and the prompt reach the tokens about equally: attention averages 257 patches
    but 77 words, so the picture's needs the larger factor."""
    if key.endswith("to_out.weight"):
        return 6.0 if key.startswith("layers.") else 2.0
    return 1.0


def _save_open_clip(path: Path, seed: int) -> None:
    """An OpenCLIP model, and its configuration beside it."""
    shapes = open_clip_shapes(OPEN_CLIP_WIDTH, OPEN_CLIP_LAYERS, OPEN_CLIP_SIZE, OPEN_CLIP_PATCH)
    _save(path, {**strided_weights(shapes, clip_gain, seed), "logit_scale": torch.tensor(0.0)})
    tower = {"width": OPEN_CLIP_WIDTH, "layers": OPEN_CLIP_LAYERS}
    vision = {**tower, "image_size": OPEN_CLIP_SIZE, "patch_size": OPEN_CLIP_PATCH, "head_width": 32}
    text = {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2}
    config = {"embed_dim": OPEN_CLIP_WIDTH, "vision_cfg": vision, "text_cfg": text}
    path.with_suffix(".json").write_text(json.dumps({"model_cfg": config}))


def _save(path: Path, weights: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
