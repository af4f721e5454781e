"""Folders of transformers and diffusers are read whole or not at all: nothing is filled with random numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.frozen.encoders import HuggingFaceImageTower, load_image_tower, read_whole

WEIGHTS = {"tower": "model.safetensors", "network": "diffusion_pytorch_model.safetensors"}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """``tower`` and ``network``, tiny ones."""
    from diffusers import ControlNetModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**small, image_size=32, patch_size=16, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "tower")
    network = ControlNetModel(
        down_block_types=("DownBlock2D",), block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=2, conditioning_embedding_out_channels=(4, 4),
        mid_block_type="UNetMidBlock2D", only_cross_attention=False,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "network")
    return tmp_path


def read(folder: Path) -> Any:
    from diffusers import ControlNetModel

    if folder.name == "tower":
        return load_image_tower(folder).model
    return read_whole(ControlNetModel, folder, "a diffusers ControlNet")


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_whole_is_read_as_it_is(folders: Path, name: str) -> None:
    expected = load_file(folders / name / WEIGHTS[name])
    found = read(folders / name).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_are_refused(folders: Path, name: str) -> None:
    path = folders / name / WEIGHTS[name]
    state = load_file(path)
    lost = sorted(state)[3]
    save_file({key: tensor for key, tensor in state.items() if key != lost}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{name} lacks 1 weights of a \S+ .*\({re.escape(lost)}, \.\.\.\); give .*\.$"
    ):
        read(folders / name)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", ["no weights", "half the weights", "half the settings", "another model"])
def test_wrong_folders_end_in_one_sentence(folders: Path, name: str, damage: str) -> None:
    path, config = folders / name / WEIGHTS[name], folders / name / "config.json"
    if damage == "no weights":
        path.unlink()
    elif damage == "half the weights":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "half the settings":
        config.write_text(config.read_text()[:40])
    else:
        save_file({"linear.weight": torch.zeros(2, 2)}, path, {"format": "pt"})
        config.write_text(json.dumps({"model_type": "bert", "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=rf"^\S+{name} (is no folder of|lacks \d+ weights of) a .*; give [^.;]+\.$"):
        read(folders / name)


def test_a_tower_is_read_by_its_class(folders: Path) -> None:
    assert isinstance(load_image_tower(folders / "tower"), HuggingFaceImageTower)
