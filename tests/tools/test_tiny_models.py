"""The tiny models' own promises: small, whole, finite and the same every time. What they do is tested in tests/host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tools.tiny.models import TINY_NAMES, adapter, checkpoint, make_tiny_models, with_tiny_names
from tools.tiny.shapes import FULL_UNET, MIN_UNET, UNetLayout


def test_all_files_together_stay_small(tmp_path: Path) -> None:
    models = make_tiny_models(tmp_path)
    assert 1e6 < sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) < 10e6


@pytest.mark.parametrize("layout, layers, million", [(MIN_UNET, 3, 18.7), (FULL_UNET, 16, 111)])
def test_unet_has_the_stated_size(layout: UNetLayout, layers: int, million: float) -> None:
    weights = checkpoint(layout, seed=1)
    unet = [value for key, value in weights.items() if key.startswith("model.diffusion_model.")]
    assert layout.cross_attentions == layers
    assert sum(value.numel() for value in unet) / 1e6 == pytest.approx(million, rel=0.02)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_the_seed_decides_every_number() -> None:
    first, again, other = (adapter(MIN_UNET, seed=seed)["image_proj"] for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["latents"], other["latents"])


def test_released_adapter_has_the_released_number_of_parameters() -> None:
    """88.05 million, less what 320 channels on every level save in the keys and values."""
    parts = adapter(FULL_UNET, seed=1)
    assert sorted(int(key.split(".")[0]) for key in parts["ip_adapter"]) == sorted([*range(1, 32, 2)] * 2)
    channels = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280]
    saved = 2 * 768 * (sum(channels) - 16 * 320)
    tiny = sum(value.numel() for part in parts.values() for value in part.values())
    assert (tiny + saved) / 1e6 == pytest.approx(88.05, abs=0.02)


def test_names_are_replaced_in_either_workflow_format() -> None:
    name = "control_v11p_sd15_scribble_fp16.safetensors"
    page = {"nodes": [{"id": 1, "widgets_values": [name, 1.0]}]}
    api = {"1": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": name}}}
    assert with_tiny_names(page) == {"nodes": [{"id": 1, "widgets_values": [TINY_NAMES[name], 1.0]}]}
    assert with_tiny_names(api)["1"]["inputs"]["control_net_name"] == TINY_NAMES[name]
