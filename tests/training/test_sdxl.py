"""SDXL from pictures to an exported adapter: two text encoders, the pooled vector, size numbers, its own widths."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import Base, InstructionEncoder
from ipadapter_instruct_core.guidance import Row, simple_coefficients
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from safetensors.torch import load_file
from studios import encode, furnish
from tiny_base import POOLED, WIDTH, WIDTH_2, NoAdapter, save_sd15, save_sdxl
from tools.tiny.diffusers_models import save_ip_adapter_plus
from training.datasets.shards import Tally
from training.features.draws import Draw, Dropped
from training.features.stored import FeatureSource, RawSource, Source, encode_batch
from training.frozen.base import load_base
from training.frozen.encoders import EncoderPaths, Encoders, load_encoders
from training.frozen.sampling import Conditioning, initial_noise, sample
from training.frozen.unet import cross_attentions, prepare_unet
from training.instructions import load_bank
from training.train.adapter import losses
from training.train.batches import collate
from training.train.export import ExportConfig, run

from runs import assert_same_moments, moments, train

TASKS = (Task.EVERYTHING, Task.STYLE, Task.COMPOSITION)  # one of them with three-way guidance
SHORT = {
    "steps": 4,
    "learning_rate": 1e-6,  # small: rounding of a step tells in the next gradient
    "checkpoint_every": 4,
    "projector": "released",
    "dropout": {"text": 0.15, "words": 0.15, "image": 0.15, "all": 0.15},
    "validation": {"every": 4, "samples": 2, "pictures": 1, "steps": 2},
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``clip``, ``data/TASK``, ``features``, and ``start.safetensors``, an IPAdapter+."""
    folder = tmp_path_factory.mktemp("studio")
    save_sdxl(folder / "base")
    furnish(folder, TASKS)
    encode(folder, TASKS)
    layers = cross_attentions(load_base(folder / "base").network)
    assert [number for number, _ in layers] == list(range(1, 16, 2))
    save_ip_adapter_plus(folder / "start.safetensors", folder / "base")
    return folder


@pytest.fixture(scope="module")
def from_features(studio: Path) -> Path:
    train(studio, studio / "from-features", **SHORT)
    return studio / "from-features"


@pytest.fixture(scope="module")
def from_pictures(studio: Path) -> Path:
    raw = {
        "features": None,
        "data": [studio / "data" / task.value for task in TASKS],
        "image_encoder": studio / "clip",
        "resolution": 64,
    }
    train(studio, studio / "from-pictures", **SHORT | raw)
    return studio / "from-pictures"


@pytest.fixture(scope="module")
def sources(studio: Path) -> tuple[FeatureSource, RawSource, Encoders]:
    """The same samples as features and as pictures, and the encoders."""
    encoders = load_encoders(EncoderPaths(base=studio / "base", image_encoder=studio / "clip"), with_network=True)
    folders = [studio / "data" / task.value for task in sorted(TASKS, key=lambda task: task.value)]
    raw = RawSource(folders, "train", Tally(0), encoders.image_tower.preprocess, 64, load_bank())
    return FeatureSource(studio / "features", "train", Tally(0)), raw, encoders


def draws_of_every_kind(source: Source) -> list[Draw]:
    """Each task with each set of dropped conditions."""
    kinds = enumerate((task, dropped) for task in TASKS for dropped in Dropped)
    return [
        Draw(task, source.by_task[task][n % 8], 0.13 * (n % 7), dropped, 60 * n, noise_seed=n)
        for n, (task, dropped) in kinds
    ]


@torch.no_grad()
def test_a_batch_from_pictures_equals_one_from_features(sources: tuple[FeatureSource, RawSource, Encoders]) -> None:
    features, raw, encoders = sources
    assert features.by_task == raw.by_task and features.sha256 == raw.sha256
    draws = draws_of_every_kind(raw)
    expected = collate([features.item(draw) for draw in draws])
    found = encode_batch(encoders, collate([raw.item(draw) for draw in draws]))
    widths = {"text": WIDTH + WIDTH_2, "prompt": WIDTH, "instruction": WIDTH, "pooled": POOLED, "image": 48}
    assert {name: expected[name].shape[-1] for name in widths} == widths
    assert found.keys() == expected.keys() == {*widths, "noise", "latents"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@torch.no_grad()
def test_what_is_dropped_of_both_encoders(sources: tuple[FeatureSource, RawSource, Encoders]) -> None:
    features, _, encoders = sources
    base = encoders.base
    nothing = base.text_states(base.tokens([""]))
    for draw in draws_of_every_kind(features):
        item = features.item(draw)
        whole = base.text_states(base.tokens([json.loads(features.shards[draw.sample]["json"])["prompt"]]))
        text = nothing if draw.dropped in (Dropped.TEXT, Dropped.WORDS, Dropped.ALL) else whole
        prompt = nothing if draw.dropped in (Dropped.WORDS, Dropped.ALL) else whole
        pooled = nothing if draw.dropped is Dropped.ALL else whole  # as in guidance
        for name, tensor in (("text", text.hidden), ("pooled", pooled.pooled), ("prompt", prompt.prompt)):
            torch.testing.assert_close(item[name], tensor[0], rtol=1e-5, atol=1e-5, msg=f"{name}, {draw.dropped}")
    assert not torch.equal(nothing.pooled, whole.pooled)


def test_training_from_features_and_from_pictures_ends_alike(
    studio: Path, from_features: Path, from_pictures: Path
) -> None:
    ours, start = weights(from_features), load_file(studio / "start.safetensors")
    assert ours.keys() > start.keys()
    assert all((ours[key] - start[key]).abs().max() > 3.5e-6 for key in start), "a weight was not trained"
    assert_same_moments(moments(from_pictures), moments(from_features), tolerance=2e-4)
    steps = zip(lines(from_features / "metrics.jsonl"), lines(from_pictures / "metrics.jsonl"), strict=True)
    looks = zip(lines(from_features / "validation.jsonl"), lines(from_pictures / "validation.jsonl"), strict=True)
    pairs = [(one[f"loss/{task.value}"], two[f"loss/{task.value}"]) for one, two in steps for task in TASKS]
    pairs += [(one[task.value]["loss"], two[task.value]["loss"]) for one, two in looks for task in TASKS]
    assert len(pairs) == 9
    for one, two in pairs:
        assert one == pytest.approx(two, rel=1e-5)


def test_the_loss_is_diffusers_own(sources: tuple[FeatureSource, RawSource, Encoders]) -> None:
    """A plain UNet with the added conditions as the SDXL pipeline gives them, and no adapter."""
    features, _, encoders = sources
    base = encoders.base
    draws = draws_of_every_kind(features)[:4]
    batch = collate([{**features.item(draw), "timestep": draw.timestep} for draw in draws])
    added = {"text_embeds": batch["pooled"], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4)}
    with torch.no_grad():
        noisy = base.schedule.add_noise(batch["latents"], batch["noise"], batch["timestep"])
        plain = base.network(noisy, batch["timestep"], encoder_hidden_states=batch["text"], added_cond_kwargs=added)[0]
        expected = (plain - batch["noise"]).pow(2).mean(dim=(1, 2, 3))
        prepared = copy.deepcopy(base.network)
        prepare_unet(prepared)
        batch["added"] = base.added(batch["pooled"], 64, torch.float32)
        found = losses(prepared, NoAdapter(), base.schedule, batch, torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for name, tensor in batch["added"].items():
            changed = {**batch, "added": {**batch["added"], name: tensor * 0}}
            other = losses(prepared, NoAdapter(), base.schedule, changed, torch.float32)
            assert (other - expected).abs().min() > 1e-5, f"{name} is not read"


def test_pictures_are_sampled_as_by_diffusers(studio: Path) -> None:
    """Classifier-free guidance without an adapter; the negative prompt is encoded, as the host does it."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(studio / "base", force_zeros_for_empty_prompt=False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise([7, 8], (4, 8, 8))
    prompts = ["a fox in the snow", "two boats"]
    size = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    expected = pipe(prompts, negative_prompt=["", ""], latents=noise.clone(), **size).images
    base = load_base(studio / "base")
    prepare_unet(base.network)
    rows = {}
    with torch.no_grad():
        for row, texts in ((Row.FULL, prompts), (Row.UNCOND, ["", ""])):
            states = base.text_states(base.tokens(texts))
            rows[row] = Conditioning(states.hidden, None, states.pooled)
    found = sample(base, rows, simple_coefficients(5.0), noise, 4)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_validation_pictures(from_features: Path, from_pictures: Path) -> None:
    for task in TASKS:
        sheets = [run / "validation" / "step-00000004" / f"{task.value}.jpg" for run in (from_features, from_pictures)]
        one, two = (np.asarray(Image.open(path), dtype=np.float32) for path in sheets)
        assert one.shape == (64 + 2 * 2, 3 * (64 + 2) + 2, 3)  # condition, target, result, with gaps of two pixels
        assert np.abs(one - two).max() <= 8  # after JPEG
        made = one[2:66, 134:198]
        assert made.std() > 1, "the picture is of one colour"


def test_the_export_loads_as_an_sdxl_adapter(from_features: Path, tmp_path: Path) -> None:
    run(ExportConfig(run=from_features, out=tmp_path / "adapter.safetensors"))
    adapter = load(tmp_path / "adapter.safetensors")
    config = adapter.config
    assert (config.base, config.output_width) == (Base.SDXL, WIDTH + WIDTH_2)
    assert (config.instruction_width, config.prompt_width) == (WIDTH, WIDTH)
    assert config.instruction_encoder is InstructionEncoder.CLIP_L
    assert config.layers == tuple(zip(range(1, 16, 2), [64] * 8, strict=True))
    trained, state = weights(from_features), load_file(tmp_path / "adapter.safetensors")
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in trained.items())


def test_features_of_sdxl_are_refused_for_sd15(studio: Path, tmp_path: Path) -> None:
    save_sd15(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="were made with another vae than this base"):
        train(studio, tmp_path / "run", **SHORT, base=tmp_path / "base")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000004" / "adapter.safetensors")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
