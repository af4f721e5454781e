"""Builds whose targets the real generators make, with tiny random models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import pixels
from safetensors.torch import save_file
from sources import make_commoncanvas, make_styles
from tiny_base import OPEN_CLIP, WIDTH, save_sd15
from training.datasets.build import BuildConfig, run
from training.datasets.index import Shards
from training.datasets.sample import Sample
from training.datasets.shards import Tally

GENERATION = {"size": 64, "steps": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def scribble(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the tiny base whose output is not zero, as that of an untrained one would be."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(workshop / "base", subfolder="unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for block in (
        *network.controlnet_down_blocks,
        network.controlnet_mid_block,
        network.controlnet_cond_embedding.conv_out,
    ):
        torch.nn.init.normal_(block.weight, std=0.3)
    folder = tmp_path_factory.mktemp("scribble")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_adapter(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain IPAdapter for the tiny base and the tiny OpenCLIP, with large random weights."""
    from training.frozen.base import load_base
    from training.frozen.unet import cross_attentions

    torch.manual_seed(0)
    state = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, OPEN_CLIP["embed_dim"]),
        "image_proj.proj.bias": torch.randn(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    for number, width in cross_attentions(load_base(workshop / "base").network):
        state |= {f"ip_adapter.{number}.to_{kind}_ip.weight": torch.randn(width, WIDTH) for kind in "kv"}
    path = tmp_path_factory.mktemp("adapter") / "ip-adapter.safetensors"
    save_file(state, path)
    return path


def targets(source: dict, out: Path, **settings: object) -> dict[str, np.ndarray]:
    """The generated pictures of a build, by their samples' ids."""
    run(BuildConfig(source=source, out=out, validation=0, size=0, samples_per_shard=6, **settings))
    shards = Shards(sorted(out.glob("*.tar")), Tally(0))
    samples = [Sample.from_members(shards[index]) for index in range(len(shards))]
    made = {sample.source_id: pixels(sample.target) for sample in samples}
    assert all(picture.shape == (64, 64, 3) and picture.std() > 1 for picture in made.values())
    return made


def assert_told_apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert all(np.abs(one[name] - other[name]).mean() > 1 for name in one)


def test_composition_targets_by_a_scribble_controlnet(workshop, scribble, tmp_path):
    make_commoncanvas(tmp_path / "cc", 9)
    generation = {**GENERATION, "base": workshop / "base", "controlnet": scribble}
    source = {"kind": "composition", "pictures": tmp_path / "cc", "targets": generation}
    made = targets(source, tmp_path / "a")
    assert len(made) == 9
    one_by_one = targets({**source, "targets": {**generation, "batch_size": 1}}, tmp_path / "b")
    assert all(np.abs(made[name] - one_by_one[name]).mean() < 0.2 for name in made), "whatever the batch"
    assert_told_apart(made, targets({**source, "targets": {**generation, "scale": 0}}, tmp_path / "c"))
    assert_told_apart(made, targets(source, tmp_path / "d", seed=1))


def test_style_targets_by_instant_style(workshop, plain_adapter, tmp_path):
    make_styles(tmp_path / "styles", 6)
    models = {"base": workshop / "base", "adapter": plain_adapter, "image_encoder": workshop / "clip"}
    generation = {**GENERATION, **models}
    pictures = {"pictures": tmp_path / "styles" / "pictures", "prompts": tmp_path / "styles" / "art.csv"}
    source = {"kind": "style", **pictures, "targets": generation}
    made = targets(source, tmp_path / "a")
    assert len(made) == 6
    assert_told_apart(made, targets({**source, "targets": {**generation, "scale": 0}}, tmp_path / "b"))


@pytest.mark.parametrize("kind", ["composition", "style"])
def test_a_build_is_held_to_its_models_wherever_they_lie(workshop, scribble, plain_adapter, tmp_path, kind):
    make_commoncanvas(tmp_path / "pictures", 6)
    (tmp_path / "art.txt").write_text("a boat at dawn")
    models = {"base": workshop / "base", "controlnet": scribble}
    if kind == "style":
        models = {"base": workshop / "base", "adapter": plain_adapter, "image_encoder": workshop / "clip"}
    source = {"kind": kind, "pictures": tmp_path / "pictures", "targets": {**GENERATION, **models}}
    if kind == "style":
        source["prompts"] = tmp_path / "art.txt"
    out = tmp_path / "out"
    made = targets(source, out)
    kept = json.loads((out / "settings.json").read_text())
    assert set(models) - {"base"} < set(kept["models"]) >= {"vae", "text_encoder", "unet"}
    for name, path in models.items():
        (tmp_path / name).symlink_to(path)
    moved = {**source, "targets": {**GENERATION, **{name: tmp_path / name for name in models}}}
    (out / "train-00000.tar").unlink()
    again = targets(moved, out)
    assert all(np.array_equal(again[name], picture) for name, picture in made.items())
    (out / "train-00000.tar").unlink()
    other = {**source, "targets": {**moved["targets"], "base": save_sd15(tmp_path / "other", seed=5)}}
    with pytest.raises(ValueError, match=r"out holds samples built with models\.\w+ = \w{12}…, not \w{12}…; give it"):
        targets(other, out)
    del kept["models"]  # as of before they were kept
    (out / "settings.json").write_text(json.dumps(kept))
    targets(source, out)
    assert "unet" in json.loads((out / "settings.json").read_text())["models"]


def test_models_that_are_not_there_are_told_before_anything_is_made(workshop, tmp_path):
    make_commoncanvas(tmp_path / "cc", 4)
    for models, message in (
        ({"base": tmp_path / "nowhere", "controlnet": tmp_path}, "There is no base model .*nowhere"),
        (
            {"base": workshop / "base", "controlnet": tmp_path / "nowhere"},
            "nowhere is no folder of a diffusers ControlNet",
        ),
    ):
        source = {"kind": "composition", "pictures": tmp_path / "cc", "targets": {**GENERATION, **models}}
        with pytest.raises(ValueError, match=message):
            targets(source, tmp_path / "out" / models["base"].name)
        assert not list((tmp_path / "out" / models["base"].name).glob("*.tar"))
