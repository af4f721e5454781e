"""A run learns what it should and leaves the rest alone: gradients, starts, averages, precision, logs, validation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import Base, InstructionEncoder
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from safetensors.torch import load_file
from shards_of_photographs import save_shards
from tiny_base import OPEN_CLIP, WIDTH
from torch import Tensor
from training.features.draws import Draws, Dropout
from training.frozen.base import FrozenBase
from training.train import checkpoints, validation
from training.train.adapter import start_adapter
from training.train.loop import Trainer, accumulation
from training.train.optimizer import PARTS
from training.train.settings import TrainConfig

from runs import assert_same_gradients, assert_same_moments, moments, settings, train, weights

pytestmark = pytest.mark.usefixtures("features")
WIDTHS = {"image": OPEN_CLIP["vision_cfg"]["width"], "instruction": WIDTH, "prompt": WIDTH, "text": WIDTH}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Another precision in the same process is refused otherwise."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def made(workshop: Path, out: Path, **changes: object) -> Trainer:
    config = TrainConfig(**settings(workshop, out, **changes))
    accelerator = Accelerator(cpu=True, mixed_precision=config.precision)
    accelerator.gradient_accumulation_steps = accumulation(config, 1)
    out.mkdir(parents=True, exist_ok=True)
    return Trainer(config, accelerator)


def log_of(out: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


@pytest.mark.parametrize("projector", ["paper", "released"])
def test_the_instruct_layers_can_learn_alone(workshop: Path, tmp_path: Path, projector: str) -> None:
    """Stopped and taken up again on the way; what they do not read stays bit for bit, in the average too."""
    start, out = load(workshop / "start.safetensors").state_dict(), tmp_path / "run"
    alone = {"trained": "instruct", "projector": projector, "learning_rate": 0.01, "ema": 0.5, "new_layer_sigma": 0.05}
    first = made(workshop, tmp_path / "untrained", steps=2, **alone).state.weights(averaged=False)
    train(workshop, out, steps=1, **alone)
    found = train(workshop, out, steps=2, **alone)
    changed = {key for key, tensor in found.items() if not torch.equal(tensor, first[key])}
    new = {key for key in found if key not in start}
    assert changed == {key for key in new if key.startswith("image_proj.")} and len(new) > 20
    assert all(torch.equal(tensor, found[key]) for key, tensor in start.items())
    average = weights(out, "average.safetensors")
    assert {key for key, tensor in average.items() if not torch.equal(tensor, first[key])} == changed
    assert log_of(out)[-1]["update_norm/instruct"] > 0 == log_of(out)[-1]["update_norm/key_values"]


@pytest.mark.parametrize("sigma", [None, 0.05])
@pytest.mark.parametrize("start", ["start.safetensors", None])
def test_the_new_layers_start_as_loud_as_the_settings_say(
    workshop: Path, tmp_path: Path, start: str | None, sigma: float | None
) -> None:
    """By default as the paper's (Sec. 3.5)."""
    changes = {} if sigma is None else {"new_layer_sigma": sigma}
    trainer = made(workshop, tmp_path / "run", start=start and workshop / start, projector="released", **changes)
    deviations = {
        name: float(weight.detach().std())
        for name, weight in trainer.model.named_parameters()
        if "_layers." in name and name.endswith(("to_q.weight", "to_kv.weight", "1.1.weight"))
    }
    assert len(deviations) >= 6
    assert deviations == pytest.approx(dict.fromkeys(deviations, sigma or 1e-4), rel=0.1)


@pytest.mark.parametrize("projector", ["paper", "released"])
def test_every_weight_learns_and_the_base_stays(workshop: Path, tmp_path: Path, projector: str) -> None:
    trainer = made(workshop, tmp_path / "run", projector=projector, steps=4, learning_rate=0.01)
    frozen = {"unet": trainer.base.network, "vae": trainer.base.vae, "text": trainer.base.text_encoders[0]}
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in frozen.items()}
    largest: Counter[str] = Counter()
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: largest.update({name: float(p.grad.abs().max())})
        )
    trainer.train()
    for name, model in frozen.items():
        after = model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before[name].items()), name
        assert all(p.grad is None for p in model.parameters())
    assert largest.keys() == dict(trainer.model.named_parameters()).keys()
    assert [name for name, value in largest.items() if not value > 0] == []
    new = "new_input_layers.0" if projector == "paper" else "prompt_layers.0"
    assert any(new in name for name in largest)
    start = load_file(workshop / "start.safetensors")
    assert all(not torch.equal(tensor, start[key]) for key, tensor in weights(tmp_path / "run").items() if key in start)


def test_the_loss_falls(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On always the same two samples, timesteps and noises."""
    draw = Draws.draw
    monkeypatch.setattr(Draws, "draw", lambda self, step, position, attempt=0: draw(self, 1, position))
    nothing = {"text": 0, "words": 0, "image": 0, "all": 0}
    out = tmp_path / "run"
    train(workshop, out, steps=40, batch_size=2, learning_rate=1e-2, log_every=1, checkpoint_every=100, dropout=nothing)
    values = [line["loss"] for line in log_of(out)]
    assert values[-1] < 0.8 * values[0]
    assert sum(later < before for before, later in zip(values, values[1:], strict=False)) > 30


def test_a_task_weighs_as_it_is_told(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(workshop, out, steps=6, log_every=1, tasks={"style": 3.0, "object": 1.0})
    source = SimpleNamespace(by_task={Task.STYLE: range(8), Task.OBJECT: range(8)})
    draws = Draws(0, source.by_task, {Task.STYLE: 3.0, Task.OBJECT: 1.0}, Dropout())
    for line in log_of(out):
        counts = Counter(draws.draw(line["step"], position).task.value for position in range(8))
        parts = {name.removeprefix("loss/"): value for name, value in line.items() if name.startswith("loss/")}
        assert parts.keys() == counts.keys()
        assert line["loss"] == pytest.approx(sum(parts[task] * count for task, count in counts.items()) / 8)


def test_accumulated_gradients_are_those_of_the_whole_batch(workshop: Path, tmp_path: Path) -> None:
    found: dict[int, list[Tensor]] = {}
    for micro in (8, 2, 1):
        trainer = made(workshop, tmp_path / str(micro), micro_batch_size=micro, steps=1, max_grad_norm=0)
        parameters = list(trainer.model.parameters())
        gradients = found[micro] = []
        trainer.optimizer.optimizer.register_step_pre_hook(
            lambda *_, parameters=parameters, gradients=gradients: gradients.extend(p.grad.clone() for p in parameters)
        )
        trainer.train()
        assert len(gradients) == len(parameters)
    for micro in (2, 1):
        assert_same_gradients(found[micro], found[8], tolerance=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    workshop: Path, tmp_path: Path, precision: str
) -> None:
    """Both times with the same kernel: in half as many bits not the fused one, for pictures as small as these."""
    calls, found = {}, {}
    for asked in (False, True):
        changes = {"gradient_checkpointing": asked, "precision": precision, "steps": 2, "micro_batch_size": 8}
        trainer = made(workshop, tmp_path / str(asked), **changes)
        block = trainer.base.network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        seen: list[bool] = []
        block.register_forward_hook(lambda *_, seen=seen: seen.append(torch.backends.cuda.flash_sdp_enabled()))
        trainer.train()
        calls[asked], found[asked] = seen, moments(tmp_path / str(asked))
    assert calls == {False: 2 * [precision == "no"], True: 4 * [precision == "no"]}
    assert_same_moments(found[True], found[False], tolerance=1e-4)


def test_a_compiled_base_gives_the_same(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated as for a card; generating C++ for the CPU would take minutes."""
    captured = []

    def compiled(model: torch.nn.Module) -> torch.nn.Module:
        captured.append(model)
        return compile_(model, backend="aot_eager", fullgraph=True)

    compile_ = torch.compile
    train(workshop, tmp_path / "plain", steps=1, micro_batch_size=8)
    monkeypatch.setattr(torch, "compile", compiled)
    train(workshop, tmp_path / "compiled", steps=1, micro_batch_size=8, compile=True)
    assert len(captured) == 1
    assert_same_moments(moments(tmp_path / "compiled"), moments(tmp_path / "plain"), tolerance=1e-4)


def test_averages_follow_their_recursion(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(workshop, out, steps=4, checkpoint_every=1, keep=10, ema=0.75, projector="released")
    folders = [checkpoints.path_of(out / "checkpoints", step) for step in range(1, 5)]
    seen = [load_file(folder / "adapter.safetensors") for folder in folders]
    average = start_adapter(
        workshop / "start.safetensors", "released", WIDTHS, load(workshop / "start.safetensors").config.layers,
        Base.SD15, InstructionEncoder.CLIP_L, seed=0,
    ).state_dict()  # fmt: skip
    assert largest_difference(seen[0], average) > 1e-4
    for folder, now in zip(folders, seen, strict=True):
        average = {key: 0.75 * tensor + 0.25 * now[key] for key, tensor in average.items()}
        assert largest_difference(load_file(folder / "average.safetensors"), average) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant_with_warmup", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_the_learning_rate_warms_up(workshop: Path, tmp_path: Path, schedule: str, expected: list[float]) -> None:
    out = tmp_path / "run"
    train(workshop, out, schedule=schedule, warmup=4, log_every=1, checkpoint_every=1, keep=8, batch_size=2)
    assert [line["learning_rate"] for line in log_of(out)] == pytest.approx(
        [1e-3 * share for share in expected], rel=1e-5
    )
    first, second = (load_file(checkpoints.path_of(out / "checkpoints", n) / "adapter.safetensors") for n in (1, 2))
    start = load_file(workshop / "start.safetensors")
    assert all(torch.equal(first[key], tensor) for key, tensor in start.items())  # it rises from zero
    assert not all(torch.equal(second[key], tensor) for key, tensor in start.items())


def test_the_log_holds_what_was_promised(workshop: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train(workshop, out, steps=5, trackers=["tensorboard"])
    lines = log_of(out)
    assert [line["step"] for line in lines] == [2, 4, 5]
    tasks = {"loss/everything", "loss/style", "loss/object"}
    others = {"loss", "learning_rate", "images_per_second", "seconds_per_step", "loader_wait_share", "memory_gib"}
    others |= {f"{kind}_norm/{part}" for kind in ("gradient", "update") for part in PARTS}
    for line in lines:
        assert others | {"step"} <= line.keys() <= others | tasks | {"step"}
        assert line["images_per_second"] * line["seconds_per_step"] == pytest.approx(8)
        assert 0 < line["loader_wait_share"] < 1 and 0.1 < line["memory_gib"] < 30
    assert set().union(*lines) >= tasks
    events = min(out.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))  # settings have files below
    kept = EventAccumulator(str(events.parent)).Reload()
    assert [(event.step, event.value) for event in kept.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]


@pytest.mark.parametrize("projector", ["released", "ip-adapter-plus"])
def test_validation_shows_and_scores_and_changes_nothing(workshop: Path, tmp_path: Path, projector: str) -> None:
    out = tmp_path / "run"
    looked = {"every": 2, "samples": 2, "pictures": 2, "steps": 2, "scorer": workshop / "clip"}
    found = train(workshop, out, steps=3, projector=projector, validation=looked)
    plain = train(workshop, tmp_path / "plain", steps=3, projector=projector)
    assert largest_difference(found, plain) == 0
    lines = log_of(out, "validation.jsonl")
    assert [line.pop("step") for line in lines] == [2, 3]
    names = {"everything": {"CLIP-I", "CLIP-T"}, "style": {"CLIP-S", "CLIP-P"}, "object": {"CLIP-I", "CLIP-P"}}
    for line in lines:
        more = {"loss"} | ({"listens_tokens", "listens_loss"} if projector == "released" else set())
        assert {task: set(figures) for task, figures in line.items()} == {t: n | more for t, n in names.items()}
        assert all(0.5 < figures["loss"] < 2 for figures in line.values())
    for step in (2, 3):
        for task in names:
            with Image.open(out / "validation" / f"step-{step:08d}" / f"{task}.jpg") as sheet:
                assert sheet.size == (2 + 3 * 66, 2 + 2 * 66)  # condition, target, made; two samples of 64 pixels
                assert all(high > low for low, high in sheet.convert("RGB").getextrema())


def test_pictures_are_made_a_few_at_once_whatever_their_number(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the peak of memory is the same, and so are the scores."""
    looked = {"every": 1, "samples": 1, "pictures": 2, "steps": 1, "scorer": workshop / "clip"}
    sizes: list[int] = []
    decode = FrozenBase.decode
    monkeypatch.setattr(FrozenBase, "decode", lambda base, z: sizes.append(len(z)) or decode(base, z))
    lines = []
    for at_once in (2, 1):
        monkeypatch.setattr(validation, "AT_ONCE", at_once)
        train(workshop, tmp_path / str(at_once), steps=1, learning_rate=1e-12, validation=looked)
        lines += log_of(tmp_path / str(at_once), "validation.jsonl")
    assert sizes == [2] * 3 + [1] * 6
    for task, figures in lines[0].items():
        assert lines[1][task] == pytest.approx(figures, abs=2e-3)


def test_the_peak_of_memory_is_the_same_for_8_and_for_64_pictures(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors, as the allocator saw it; pictures made all at once would take eight times as much."""
    data = save_shards(tmp_path / "style", Task.STYLE, count=4, validation=64)
    raw = {"features": None, "data": [data], "image_encoder": workshop / "clip", "resolution": 64, "steps": 1}
    call, peaks = validation.Validator.__call__, []

    def measured(validator: validation.Validator, *arguments: Any) -> Any:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            result = call(validator, *arguments)
        events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
        peaks.append(max(accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns()))))
        return result

    monkeypatch.setattr(validation.Validator, "__call__", measured)
    for pictures in (8, 64):
        looked = {"every": 1, "samples": 1, "pictures": pictures, "steps": 1, "scorer": workshop / "clip"}
        train(workshop, tmp_path / str(pictures), validation=looked, **raw)
    eight, many = peaks
    assert eight > 1e6 and many < 1.1 * eight


def test_the_validation_loss_is_that_of_the_weights(workshop: Path, tmp_path: Path) -> None:
    """It depends on the weights alone, and not on the step, the batch size or the seed of the run."""
    looked = {"every": 1, "samples": 2, "pictures": 0}
    found = []
    for name, changes in {"a": {"micro_batch_size": 1}, "b": {"seed": 3, "steps": 2, "micro_batch_size": 4}}.items():
        train(workshop, tmp_path / name, **{"steps": 1, "learning_rate": 1e-12} | changes, validation=looked)
        found += log_of(tmp_path / name, "validation.jsonl")
    assert len(found) == 3 and found[0].pop("step") == 1
    for line in found[1:]:
        for task, figures in found[0].items():
            assert line[task]["loss"] == pytest.approx(figures["loss"], rel=1e-4)


def test_bf16_trains_float32_weights_to_nearly_the_same(workshop: Path, tmp_path: Path) -> None:
    exact = train(workshop, tmp_path / "exact", log_every=1)
    fresh = PartialState._shared_state, AcceleratorState._shared_state
    assert all(fresh)
    AcceleratorState._reset_state()
    found = train(workshop, tmp_path / "bf16", log_every=1, precision="bf16")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    rounded = [
        (a["loss"], b["loss"]) for a, b in zip(log_of(tmp_path / "exact"), log_of(tmp_path / "bf16"), strict=True)
    ]
    assert all(b == pytest.approx(a, rel=0.02) for a, b in rounded) and any(a != b for a, b in rounded)
    assert 0 < largest_difference(found, exact) < 0.02


def test_raw_shards_train_as_features_do(workshop: Path, tmp_path: Path) -> None:
    tasks = {"style": 1.0, "everything": 1.0}  # for subjects, features hold fewer phrasings than the bank
    common = {"tasks": tasks, "steps": 3, "learning_rate": 1e-6}  # small: rounding of a step tells in the next gradient
    train(workshop, tmp_path / "features", **common)
    raw = {"features": None, "data": [workshop / "data" / task for task in tasks], "resolution": 64}
    train(workshop, tmp_path / "raw", image_encoder=workshop / "clip", **raw, **common)
    assert_same_moments(moments(tmp_path / "raw"), moments(tmp_path / "features"), tolerance=2e-4)


def test_a_process_that_can_read_none_of_a_task_gathers_with_the_others(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of gatherings would pair the tasks wrongly, or wait for ever."""
    trainer = made(workshop, tmp_path / "run", validation={"every": 1, "samples": 1, "pictures": 0})
    gathered: list[Any] = []
    monkeypatch.setattr(validation, "gather_object", lambda parts: gathered.append(parts) or parts)
    assert trainer.validator is not None
    del trainer.validator.places[Task.STYLE]
    figures = trainer.validator(1, load(workshop / "start.safetensors").float())
    assert len(gathered) == 3 and figures.keys() == {"everything", "object"}
