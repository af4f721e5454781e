"""Wrong, damaged and incomplete base models: each is told in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from tiny_base import save_sd15, save_sdxl
from training.frozen.base import load_base

KINDS = {"sd15": save_sd15, "sdxl": save_sdxl}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``sd15`` and ``sdxl``, and each as a single file."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("bases")
    for kind, save in KINDS.items():
        save_single_file(folder / f"{kind}.safetensors", DiffusionPipeline.from_pretrained(save(folder / kind)))
    return folder


def refused(path: Path, sentence: str, config: Path | None = None) -> None:
    with pytest.raises(ValueError, match=sentence) as told:
        load_base(path, config)
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "There is no base model .*nothing; give a diffusers folder or a .safetensors")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model.ckpt", b"PK", "model.ckpt is no .safetensors file"),
        ("page.safetensors", b"<!doctype html><title>Log in</title>", "page.safetensors is not a whole safetensors"),
        ("empty.safetensors", b"", "empty.safetensors is not a whole safetensors"),
    ],
)
def test_no_weights(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, sentence)


def test_a_truncated_file(bases: Path, tmp_path: Path) -> None:
    content = (bases / "sd15.safetensors").read_bytes()
    for length in (5, 300, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        refused(tmp_path / "cut.safetensors", "cut.safetensors is not a whole safetensors file; download it again")


def only(start: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(start)


def without(part: str) -> Callable[[str], bool]:
    return lambda key: part not in key


@pytest.mark.parametrize(
    ("kind", "kept", "sentence"),
    [
        ("sd15", only("model.diffusion_model."), "holds no autoencoder; give a whole checkpoint"),
        ("sdxl", only("model.diffusion_model."), "holds no autoencoder; give a whole checkpoint"),
        ("sd15", without("first_stage_model"), "holds no autoencoder"),
        ("sd15", without("cond_stage_model"), "holds no CLIP-L text encoder"),
        ("sdxl", without("conditioner.embedders.1"), "holds no OpenCLIP text encoder"),
        ("sdxl", without("conditioner.embedders.0"), "holds no CLIP-L text encoder"),
        ("sd15", only("first_stage_model."), "is no checkpoint of SD1.5 or SDXL"),
        ("sd15", without("output_blocks.1.0.out_layers.3.weight"), r"is no SD1.5 as .* \(weights are missing\)"),
        ("sd15", without("decoder.conv_in.bias"), r"is no SD1.5 as .* \(weights are missing\)"),
        ("sd15", without("final_layer_norm.weight"), r"is no SD1.5 as .* \(weights are missing\)"),
        ("sdxl", without("embedders.1.model.ln_final.bias"), r"is no SDXL as .* \(weights are missing\)"),
    ],
)
def test_an_incomplete_checkpoint(
    bases: Path, tmp_path: Path, kind: str, kept: Callable[[str], bool], sentence: str
) -> None:
    state = load_file(bases / f"{kind}.safetensors")
    part = {key: tensor for key, tensor in state.items() if kept(key)}
    assert 0 < len(part) < len(state)
    save_file(part, tmp_path / "part.safetensors")
    refused(tmp_path / "part.safetensors", f"part.safetensors {sentence}", bases / kind)


def test_checkpoints_of_other_models(bases: Path, tmp_path: Path) -> None:
    keys = {
        "sd3": "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",
        "flux": "double_blocks.0.img_attn.norm.key_norm.scale",
        "lora": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    }
    for name, key in keys.items():
        save_file({key: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", f"{name}.safetensors is no checkpoint of SD1.5 or SDXL")
    state = load_file(bases / "sdxl.safetensors")
    second = {key.replace("conditioner.embedders.1", "cond_stage_model"): tensor for key, tensor in state.items()}
    save_file({k: v for k, v in second.items() if "conditioner" not in k}, tmp_path / "sd2.safetensors")
    refused(tmp_path / "sd2.safetensors", "sd2.safetensors holds no CLIP-L text encoder")
    save_file({**state, "edm_mean": torch.zeros(4)}, tmp_path / "edm.safetensors")
    refused(tmp_path / "edm.safetensors", "edm.safetensors follows EDM's noise schedule")


def test_a_checkpoint_of_other_widths(bases: Path) -> None:
    refused(bases / "sd15.safetensors", r"is no SD1.5 as .*base_configs/sd15 describes it \(.*\[77, 32\]")
    refused(bases / "sdxl.safetensors", "is no SDXL as .*base_configs/sdxl describes it")
    refused(bases / "sdxl.safetensors", "sdxl.safetensors is SDXL, but .*sd15 describes another", bases / "sd15")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose(path: Path, key: str) -> None:
    state = load_file(path)
    del state[key]
    save_file(state, path, {"format": "pt"})


UNET = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "model_index.json").unlink(), "holds no model_index.json; give the folder of a whole"),
        (lambda path: (path / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda path: edit(path / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline; adapters are"),
        (lambda path: shutil.rmtree(path / "vae"), "lacks its vae: there is no vae/config.json"),
        (lambda path: shutil.rmtree(path / "unet"), "lacks its unet"),
        (lambda path: shutil.rmtree(path / "text_encoder"), "lacks its text_encoder"),
        (lambda path: shutil.rmtree(path / "text_encoder_2"), "lacks its text_encoder_2"),
        (lambda path: shutil.rmtree(path / "scheduler"), "lacks its scheduler"),
        (lambda path: (path / "vae" / UNET).unlink(), "vae cannot be read .*no file named"),
        (lambda path: (path / "text_encoder" / "model.safetensors").unlink(), "text_encoder cannot be read"),
        (lambda path: (path / "unet" / "config.json").write_text("<html>"), "unet cannot be read"),
        (lambda path: cut(path / "unet" / UNET), "unet cannot be read"),
        (lambda path: cut(path / "text_encoder_2" / "model.safetensors"), "text_encoder_2 cannot be read"),
        (lambda path: lose(path / "unet" / UNET, "conv_out.bias"), "unet lacks 1 weights .conv_out.bias"),
        (lambda path: lose(path / "vae" / UNET, "quant_conv.bias"), "vae lacks 1 weights .quant_conv.bias"),
        (
            lambda path: lose(path / "text_encoder_2" / "model.safetensors", "text_projection.weight"),
            "text_encoder_2 lacks 1 weights .text_projection.weight",
        ),
        (lambda path: edit(path / "unet" / "config.json", cross_attention_dim=96), "unet cannot be read"),
        (lambda path: edit(path / "text_encoder" / "config.json", hidden_act="gelu"), "has no CLIP-L to read text"),
        (
            lambda path: edit(path / "scheduler" / "scheduler_config.json", prediction_type="sample"),
            "predicts sample; adapters are trained on",
        ),
        (
            lambda path: (path / "scheduler" / "scheduler_config.json").write_text(
                '{"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}'
            ),
            "follows the noise schedule of EDMEulerScheduler",
        ),
    ],
)
def test_a_damaged_folder(bases: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    folder = shutil.copytree(bases / "sdxl", tmp_path / "base", copy_function=shutil.copyfile)
    damage(folder)
    refused(folder, sentence)


def test_a_model_for_inpainting(tmp_path: Path) -> None:
    refused(save_sd15(tmp_path / "inpainting", in_channels=9), "takes 9 channels, as models for inpainting do")


def test_a_wrong_folder_of_configurations(bases: Path, tmp_path: Path) -> None:
    refused(bases / "sd15.safetensors", "holds no model_index.json", tmp_path)
    folder = shutil.copytree(bases / "sd15", tmp_path / "base", ignore=shutil.ignore_patterns("vae"))
    refused(bases / "sd15.safetensors", "base lacks its vae: there is no vae/config.json", folder)
