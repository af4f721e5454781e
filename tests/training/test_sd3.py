"""SD3 from pictures to an exported adapter: three text encoders, 16-channel latents, flow matching, joint layers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import AdapterConfig, Base, Form
from ipadapter_instruct_core.guidance import Row
from ipadapter_instruct_core.tasks import Task
from shards_of_photographs import save_shards
from tiny_base import NoAdapter, save_open_clip
from training.datasets.shards import Tally
from training.debug import T5_WIDTH, WIDTH, save_sd3
from training.features import encode
from training.features.draws import Draw, Dropped
from training.features.stored import FeatureSource
from training.frozen.base import FrozenBase, load_base
from training.frozen.network import embedding, prepare
from training.frozen.sampling import Settings
from training.train import adapter as trained
from training.train.adapter import TrainedAdapter, losses, start_adapter
from training.train.batches import collate
from training.train.data import instruction_encoder, state_widths
from training.train.export import ExportConfig
from training.train.export import run as export

from runs import moments, train

TASKS = (Task.STYLE, Task.COMPOSITION)
SQUARES = {
    "to_k_ip", "to_v_ip", "add_k_proj_ip", "add_v_proj_ip", "proj_ip", "proj_encoder_hidden_states_ip",
    "proj_encoder_passthrough_ip",
}  # fmt: skip
OUTPUTS = {"proj_ip", "proj_encoder_hidden_states_ip"}
SMALL = AdapterConfig(
    width=64, heads=1, depth=1, token_count=4, base=Base.SD3, form=Form.JOINT, output_suffix="_big"
)  # from scratch


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``clip``, ``data/TASK`` and ``features``."""
    folder = tmp_path_factory.mktemp("studio")
    save_sd3(folder / "base")
    save_open_clip(folder / "clip")
    data = [save_shards(folder / "data" / task.value, task) for task in TASKS]
    encode.run(
        encode.EncodeConfig(
            data=data,
            out=folder / "features",
            base=folder / "base",
            image_encoder=folder / "clip",
            resolution=64,
            precision="fp32",
            device="cpu",
        )
    )
    return folder


@pytest.fixture(scope="module")
def base(studio: Path) -> FrozenBase:
    loaded = load_base(studio / "base")
    prepare(loaded.unet)
    return loaded


@pytest.fixture(scope="module")
def features(studio: Path) -> FeatureSource:
    return FeatureSource(studio / "features", "train", Tally(0))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trained.SCRATCH, Base.SD3, SMALL)


def start(base: FrozenBase, features: FeatureSource) -> TrainedAdapter:
    layers = prepare(base.unet)
    assert layers == [(0, WIDTH), (2, WIDTH)]
    widths, encoder = state_widths(features, None), instruction_encoder(features, None)
    adapter = start_adapter(None, "released", widths, layers, Base.SD3, encoder, 0, base.unet)
    return TrainedAdapter(adapter, embedding(base.unet))


def batch_of(base: FrozenBase, features: FeatureSource) -> dict:
    draws = [
        Draw(task, features.by_task[task][0], 0.0, dropped, place, place)
        for task, dropped, place in zip(TASKS, (Dropped.NOTHING, Dropped.WORDS), (10, 700), strict=True)
    ]
    batch = collate([{**features.item(draw), "timestep": draw.timestep} for draw in draws])
    return {**batch, "added": base.added(batch["pooled"], 64, torch.float32)}


def test_the_text_is_encoded_as_by_diffusers(studio: Path, base: FrozenBase) -> None:
    """CLIP-L, CLIP-G and T5 of 77 tokens, and the pooled vectors; the projector reads CLIP-L's last normed states."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(studio / "base", local_files_only=True)
    prompts = ["a red teapot, on a table", ""]
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(prompts, None, None, max_sequence_length=77)
        states = base.text_states(base.tokens(prompts))
    assert states.hidden.shape == (2, 77 + 77, T5_WIDTH)
    torch.testing.assert_close(states.hidden, hidden)
    torch.testing.assert_close(states.pooled, pooled)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(states.prompt, pipe.text_encoder(tokens).last_hidden_state)


def test_the_loss_is_flow_matching(studio: Path, base: FrozenBase, features: FeatureSource) -> None:
    """On diffusers' plain transformer, with the shares of noise worked out here."""
    from diffusers import SD3Transformer2DModel

    plain = SD3Transformer2DModel.from_pretrained(studio / "base" / "transformer", local_files_only=True)
    batch = batch_of(base, features)
    unshifted = 1 - batch["timestep"].double() / 1000
    share = (3 * unshifted / (1 + 2 * unshifted)).float()
    mix = share[:, None, None, None]
    noisy = (1 - mix) * batch["latents"] + mix * batch["noise"]
    assert noisy.shape == (2, 16, 8, 8)
    with torch.no_grad():
        velocity = plain(noisy, batch["text"], batch["pooled"], 1000 * share).sample
        expected = (velocity - (batch["noise"] - batch["latents"])).pow(2).mean(dim=(1, 2, 3))
        found = losses(base.unet, NoAdapter(), base.schedule, batch, torch.float32)
        at_the_start = losses(base.unet, start(base, features), base.schedule, batch, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(at_the_start, found), "an adapter that has learned nothing adds something"


def gradients(base: FrozenBase, model: TrainedAdapter, batch: dict) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    losses(base.unet, model, base.schedule, batch, torch.float32).mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_first_the_output_projections_learn_and_then_all_but_the_last_passthrough(
    base: FrozenBase, features: FeatureSource
) -> None:
    model, batch = start(base, features), batch_of(base, features)
    first = gradients(base, model, batch)
    moved = {name for name, gradient in first.items() if gradient is not None and gradient.abs().max() > 0}
    assert {name.split(".")[-2] for name in moved} == OUTPUTS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in moved:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    second = gradients(base, model, batch)
    still = {name for name, gradient in second.items() if gradient is None or gradient.abs().max() == 0}
    dead = {name for name in still if name.startswith("adapter.ip_adapter")}
    assert dead == {"adapter.ip_adapter.2.proj_encoder_passthrough_ip.weight"}
    assert second["adapter.image_proj.latents"].abs().max() > 0
    checkpointed = replace(base, unet=copy.deepcopy(base.unet))
    checkpointed.unet.enable_gradient_checkpointing()
    checkpointed.unet.train()
    for name, gradient in gradients(checkpointed, model, batch).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, second[name], rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def run_folder(studio: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trained.SCRATCH, Base.SD3, SMALL)
        train(
            studio, studio / "run", start=None, projector="released", steps=60, learning_rate=3e-3, checkpoint_every=30,
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
            bare = float(losses(base.unet, NoAdapter(), base.schedule, batch, torch.float32).mean())
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
    start_of = base.unet.transformer_blocks[0].attn.to_k.weight
    change = adapter.state_dict()["ip_adapter.0.to_k_ip.weight"] - start_of
    assert 0 < change.abs().max() < start_of.abs().max()


def test_from_pictures_in_bf16_the_same_is_learned_as_from_features(studio: Path, tmp_path: Path) -> None:
    """Every encoder, T5 too, at every step; the layers within accelerate's autocast."""
    raw = {
        "features": None,
        "data": [studio / "data" / task.value for task in sorted(TASKS, key=lambda task: task.value)],
        "image_encoder": studio / "clip",
        "resolution": 64,
        "precision": "bf16",
    }
    common = {"start": None, "projector": "released", "steps": 2, "log_every": 1, "checkpoint_every": 2}
    for name, changes in {"pictures": raw, "features": {}}.items():
        AcceleratorState._reset_state()  # another precision in the same process is refused otherwise
        train(studio, tmp_path / name, **common, **changes)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("pictures", "features")
    ]
    assert len(logs[0]) == 2
    assert logs[0] == pytest.approx(logs[1], rel=0.02)
