"""The shipped configurations of SD1.5 and SDXL against what is known of the public models."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from single_file import autoencoder_state, clip_state, open_clip_state, unet_key, unet_state
from tools.tiny.shapes import FULL_UNET, clip_text_shapes, unet_shapes
from training.frozen.base import BASE_CONFIGS
from training.frozen.base_files import _schedule
from training.frozen.unet import cross_attentions

KINDS = ("sd15", "sdxl")


def model(kind: str, part: str, **changes: object) -> Any:
    """A part as the shipped configuration describes it, in full shape and without memory."""
    import diffusers
    import transformers

    config = {**json.loads((BASE_CONFIGS / kind / part / "config.json").read_text()), **changes}
    with torch.device("meta"):
        if part.startswith("text"):
            return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
        return getattr(diffusers, config["_class_name"]).from_config(config)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("kind", "part", "parameters", "tensors"),
    [
        ("sd15", "unet", 859_520_964, 686),
        ("sd15", "vae", 83_653_863, 248),
        ("sd15", "text_encoder", 123_060_480, 196),
        ("sdxl", "unet", 2_567_463_684, 1680),
        ("sdxl", "vae", 83_653_863, 248),
        ("sdxl", "text_encoder", 123_060_480, 196),
        ("sdxl", "text_encoder_2", 694_659_840, 517),
    ],
)
def test_shipped_configurations_are_of_the_public_models(kind: str, part: str, parameters: int, tensors: int) -> None:
    whole = model(kind, part)
    assert sum(parameter.numel() for parameter in whole.parameters()) == parameters
    assert len(whole.state_dict()) == tensors


def test_original_keys_agree_with_independent_tables() -> None:
    from open_clip import get_model_config
    from open_clip.transformer import TextTransformer

    assert shapes(unet_state(model("sd15", "unet", block_out_channels=[320] * 4))) == unet_shapes(FULL_UNET)
    words = shapes(clip_state(model("sd15", "text_encoder")))
    assert words.pop("text_model.embeddings.position_ids") == (1, 77)
    assert words == clip_text_shapes()
    big = get_model_config("ViT-bigG-14")
    with torch.device("meta"):
        tower = TextTransformer(**big["text_cfg"], output_dim=big["embed_dim"])
    assert shapes(open_clip_state(model("sdxl", "text_encoder_2"))) == shapes(tower.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_original_keys_become_the_configured_models(kind: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    unet, vae = model(kind, "unet"), model(kind, "vae")
    original = {f"model.diffusion_model.{key}": tensor for key, tensor in unet_state(unet).items()}
    assert shapes(convert_ldm_unet_checkpoint(original, unet.config)) == shapes(unet.state_dict())
    original = {f"first_stage_model.{key}": tensor for key, tensor in autoencoder_state(vae).items()}
    assert shapes(convert_ldm_vae_checkpoint(original, vae.config)) == shapes(vae.state_dict())


# The released adapters' numbers in ComfyUI's block names: (block, id), and the transformer's place in it.
COMFYUI = {
    "sd15": [
        *[("input", n, 0) for n in (1, 2, 4, 5, 7, 8)],
        *[("output", n, 0) for n in range(3, 12)],
        ("middle", 1, 0),
    ],
    "sdxl": [
        *[("input", n, place) for n in (4, 5) for place in range(2)],
        *[("input", n, place) for n in (7, 8) for place in range(10)],
        *[("output", n, place) for n in (0, 1, 2) for place in range(10)],
        *[("output", n, place) for n in (3, 4, 5) for place in range(2)],
        *[("middle", 1, place) for place in range(10)],
    ],
}
WIDTHS = {
    "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}


@pytest.mark.parametrize("kind", KINDS)
def test_cross_attentions_are_numbered_as_in_released_adapters(kind: str) -> None:
    unet = model(kind, "unet")
    found = cross_attentions(unet)
    assert found == list(zip(range(1, 2 * len(WIDTHS[kind]), 2), WIDTHS[kind], strict=True))
    names = [name for name in unet.attn_processors if ".attn2." in name]
    crossed = tuple("CrossAttn" in block for block in unet.config.up_block_types)
    keys = [unet_key(name, unet.config.layers_per_block, crossed) for name in names]
    places = [re.match(r"(\w+)_blocks?\.(\d+)(?:\.1)?\.transformer_blocks\.(\d+)\.", key).groups() for key in keys]
    assert [(block, int(n), int(place)) for block, n, place in places] == COMFYUI[kind]


def test_both_schedules_are_stable_diffusions() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for kind in KINDS:
        schedule = _schedule(BASE_CONFIGS / kind)
        np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)
        assert schedule.config.prediction_type == "epsilon"
