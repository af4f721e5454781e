"""SD3 from pictures to an exported adapter: three text encoders, 16-channel latents, flow matching, joint layers."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from comparing import assert_alike, pixels
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import Base, Form
from ipadapter_instruct_core.guidance import Row
from ipadapter_instruct_core.tasks import Task
from studios import encode, furnish
from tiny_base import NoAdapter
from tools.tiny.diffusers_models import SD35, T5_WIDTH, WIDTH, save_sd3, save_sd3_start
from training.datasets.sample import encode_picture
from training.datasets.shards import Tally
from training.evaluate import evaluate
from training.evaluate.cases import held_out
from training.evaluate.settings import EvaluateConfig
from training.features.draws import Draw, Dropped
from training.features.stored import FeatureSource
from training.frozen.base import FrozenBase, load_base
from training.frozen.network import prepare
from training.frozen.sampling import Settings
from training.train import checkpoints
from training.train.adapter import losses
from training.train.batches import collate
from training.train.export import ExportConfig
from training.train.export import run as export

from runs import ROOT, command, environment, moments, train

TASKS = (Task.STYLE, Task.COMPOSITION)
SQUARES = {
    "to_k_ip", "to_v_ip", "add_k_proj_ip", "add_v_proj_ip", "proj_ip", "proj_encoder_hidden_states_ip",
    "proj_encoder_passthrough_ip",
}  # fmt: skip


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``clip``, ``data/TASK``, ``features``, and ``start.safetensors``, which adds nothing."""
    folder = tmp_path_factory.mktemp("studio")
    save_sd3(folder / "base")
    furnish(folder, TASKS)
    encode(folder, TASKS)
    save_sd3_start(folder / "start.safetensors", folder / "base")
    return folder


@pytest.fixture(scope="module")
def base(studio: Path) -> FrozenBase:
    loaded = load_base(studio / "base")
    prepare(loaded.network)
    return loaded


@pytest.fixture(scope="module")
def run_folder(studio: Path) -> Path:
    train(
        studio, studio / "run", projector="released", steps=60, learning_rate=3e-3, checkpoint_every=30,
        gradient_checkpointing=True, dropout=dict.fromkeys(("text", "words", "image", "all"), 0.1),
        validation={"every": 30, "samples": 8, "pictures": 1, "steps": 2},
    )  # fmt: skip
    return studio / "run"


def test_the_loss_falls_and_pictures_are_made(run_folder: Path, studio: Path, base: FrozenBase) -> None:
    """On samples held out, at noises spread evenly, against the bare base."""
    found = [json.loads(line) for line in (run_folder / "validation.jsonl").read_text().splitlines()]
    held_out = FeatureSource(studio / "features", "validation", Tally(0), 1.0)
    for task in TASKS:
        places = held_out.by_task[task][:8]
        spread = 1000 / len(places)
        draws = [Draw(task, p, 0.0, Dropped.NOTHING, int((n + 0.5) * spread), n) for n, p in enumerate(places)]
        batch = collate([{**held_out.item(draw), "timestep": draw.timestep} for draw in draws])
        batch["added"] = base.added(batch["pooled"], 64, torch.float32)
        with torch.no_grad():
            bare = float(losses(base.network, NoAdapter(), base.schedule, batch, torch.float32).mean())
        seen = [line[task.value]["loss"] for line in found]
        assert seen[-1] < seen[0] < bare, task
        assert (run_folder / "validation" / "step-00000060" / f"{task.value}.jpg").is_file()


def test_the_text_scale_is_the_reference_setting() -> None:
    """At it the row "everything" cancels, the instruction's scale being the same."""
    settings = Settings.of_task(Task.COMPOSITION, Base.SD3, 30, None)
    assert settings.text_scale == 6.0
    assert settings.coefficients() == {Row.FULL: 6.0, Row.IMAGE: -5.0}


def test_the_exported_file_has_the_released_layout(run_folder: Path, tmp_path: Path, base: FrozenBase) -> None:
    export(ExportConfig(run=run_folder, out=tmp_path / "own.bin"))
    content = torch.load(tmp_path / "own.bin", weights_only=True)
    assert set(content["ip_adapter"]) == {f"{n}.{name}.weight" for n in (0, 2) for name in SQUARES}
    assert all(tensor.shape == (WIDTH, WIDTH) for tensor in content["ip_adapter"].values())
    assert content["image_proj"]["proj_out_big.weight"].shape == (T5_WIDTH, 64)
    adapter = load(tmp_path / "own.bin")
    assert (adapter.config.base, adapter.config.form) == (Base.SD3, Form.JOINT)
    last = "ip_adapter.2.proj_encoder_passthrough_ip.weight"
    assert torch.equal(adapter.state_dict()[last], torch.eye(WIDTH))
    assert f"adapter.{last}" not in moments(run_folder)
    assert not torch.equal(adapter.state_dict()[last.replace("2", "0", 1)], torch.eye(WIDTH))
    start_of = base.network.transformer_blocks[0].attn.to_k.weight
    change = adapter.state_dict()["ip_adapter.0.to_k_ip.weight"] - start_of
    assert 0 < change.abs().max() < start_of.abs().max()


def test_sd35_is_trained_on_the_same_features(studio: Path, tmp_path: Path) -> None:
    """Its encoders are SD3's; its file has two matrices and a norm a block."""
    base = save_sd3(tmp_path / "base", **SD35)
    start = save_sd3_start(tmp_path / "start.safetensors", base)
    train(
        studio, tmp_path / "run", base=base, start=start, projector="released", steps=20, learning_rate=3e-3,
        checkpoint_every=20, gradient_checkpointing=True,
        validation={"every": 10, "samples": 8, "pictures": 1, "steps": 2},
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    losses = [sum(line[task.value]["loss"] for task in TASKS) for line in lines]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "validation" / "step-00000020" / "style.jpg").is_file()
    export(ExportConfig(run=tmp_path / "run", out=tmp_path / "own.safetensors"))
    config = load(tmp_path / "own.safetensors").config
    assert (config.base, config.form, config.layers) == (Base.SD35, Form.IMAGE_STREAM, ((0, 64), (2, 64)))
    before, after = (load(path).state_dict() for path in (start, tmp_path / "own.safetensors"))
    names = {f"ip_adapter.{n}.{name}_ip.weight" for n in (0, 2) for name in ("to_k", "to_v", "norm_k")}
    assert names == {key for key in after if key.startswith("ip_adapter.")}
    assert not any(torch.equal(after[key], before[key]) for key in names)


def test_from_pictures_in_bf16_the_same_is_learned_as_from_features(studio: Path, tmp_path: Path) -> None:
    """Every encoder, T5 too, at every step; the layers within accelerate's autocast."""
    raw = {
        "features": None,
        "data": [studio / "data" / task.value for task in sorted(TASKS, key=lambda task: task.value)],
        "image_encoder": studio / "clip",
        "resolution": 64,
        "precision": "bf16",
    }
    common = {"projector": "released", "steps": 2, "log_every": 1, "checkpoint_every": 2}
    for name, changes in {"pictures": raw, "features": {}}.items():
        AcceleratorState._reset_state()  # another precision in the same process is refused otherwise
        train(studio, tmp_path / name, **common, **changes)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("pictures", "features")
    ]
    assert len(logs[0]) == 2
    assert logs[0] == pytest.approx(logs[1], rel=0.02)


def test_a_killed_run_goes_on_bit_for_bit(studio: Path, tmp_path: Path) -> None:
    settings = {"projector": "released", "steps": 6, "checkpoint_every": 2}
    arguments = command(studio, tmp_path / "killed", **settings)
    process = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "checkpoints"
    while not checkpoints.path_of(folder, 2).exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not checkpoints.path_of(folder, 6).exists(), "it was killed too late"
    runs = [train(studio, tmp_path / name, **settings) for name in ("killed", "whole")]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(weight, runs[1][key]) for key, weight in runs[0].items())
    states = [moments(tmp_path / name) for name in ("killed", "whole")]
    assert all(torch.equal(states[0][key][part], own[part]) for key, own in states[1].items() for part in own)


def test_pictures_are_evaluated(run_folder: Path, studio: Path, base: FrozenBase) -> None:
    """A start that adds nothing gives diffusers' own picture; the trained one another, by instruction."""
    from diffusers import StableDiffusion3Pipeline

    export(ExportConfig(run=run_folder, out=studio / "own.safetensors"))
    rows = {"start": {"all": studio / "start.safetensors"}, "own": {"all": studio / "own.safetensors"}}
    config = EvaluateConfig(
        data=[studio / "data" / task.value for task in TASKS], base=studio / "base", image_encoder=studio / "clip",
        scorer=studio / "clip", resolution=64, steps=3, samples=1, device="cpu", rows=rows, out=studio / "evaluation",
    )  # fmt: skip
    evaluate.run(config)
    made = {
        (row, task): pixels((config.out / row / task.value / "00000.jpg").read_bytes())
        for row in rows
        for task in TASKS
    }
    case = held_out(config)[Task.STYLE][0]
    pipe = StableDiffusion3Pipeline.from_pretrained(studio / "base", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(case.seed))
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 6.0, "max_sequence_length": 77}
    plain = pipe(case.sample.prompt, negative_prompt="", latents=noise, **size).images[0]
    assert_alike(made["start", Task.STYLE], pixels(encode_picture(plain)), tolerance=1)
    for task in TASKS:
        assert np.abs(made["own", task] - made["start", task]).mean() > 0.5
    assert all(f"| {row} |" in (config.out / "table.md").read_text() for row in rows)
