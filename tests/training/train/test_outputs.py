"""What a run leaves beside its checkpoints: snapshots and traces; and how batches reach it where memory is scarce."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from ipadapter_instruct_core.checkpoint import load
from safetensors.torch import load_file
from training.frozen.base import FrozenBase
from training.train import batches, checkpoints
from training.train.loop import Trainer

from runs import train, weights

pytestmark = pytest.mark.usefixtures("features")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def test_snapshots_of_the_average_stay_in_half_precision(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(workshop, out, steps=6, ema=0.5, checkpoint_every=2, keep=1, snapshot_every=2)
    found = sorted((out / "snapshots").iterdir())
    assert [path.name for path in found] == [f"step-0000000{step}.safetensors" for step in (2, 4, 6)]
    assert len(list((out / "checkpoints").glob("step-*"))) == 1
    average = weights(out, "average.safetensors")
    last = load_file(found[-1])
    assert last.keys() == average.keys() and {tensor.dtype for tensor in last.values()} == {torch.float16}
    assert all(torch.equal(tensor, average[key].half()) for key, tensor in last.items())
    assert any(not torch.equal(tensor, weights(out)[key].half()) for key, tensor in last.items())
    assert load(found[0]).config.follows_instructions


def test_taking_a_snapshot_changes_nothing(workshop: Path, tmp_path: Path) -> None:
    plain = train(workshop, tmp_path / "plain", steps=4, snapshot_every=0)
    found = train(workshop, tmp_path / "run", steps=4, snapshot_every=1)
    assert not (tmp_path / "plain" / "snapshots").exists()
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())


def test_a_snapshot_is_there_before_the_checkpoint_of_its_step(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that was killed between the two would go on behind it."""
    out = tmp_path / "run"

    def killed(folder: Path, step: int, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(workshop, out, steps=2, checkpoint_every=2, snapshot_every=2)
    assert [path.name for path in (out / "snapshots").iterdir()] == ["step-00000002.safetensors"]


LOOKED = {"every": 4, "samples": 1, "pictures": 1, "steps": 1}


def looked_at(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "validation.jsonl").read_text().splitlines()]


def test_memory_that_runs_out_in_a_validation_costs_no_steps(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command meets it again at the same step, one without pictures goes on from there."""
    out = tmp_path / "run"

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FrozenBase, "decode", full)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                train(workshop, out, validation=LOOKED)
            assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
        assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [2, 4]
        found = train(workshop, out, validation={**LOOKED, "pictures": 0})
    assert looked_at(out) == [4, 8]
    plain = train(workshop, tmp_path / "plain")
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())
    train(workshop, out, validation=LOOKED)
    assert looked_at(out) == [4, 8], "it was done"


def test_a_run_that_is_to_stop_saves_and_is_looked_at_when_it_goes_on(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_asked_to_stop", lambda trainer, step: step == 4)
        train(workshop, out, validation=LOOKED)
    assert not (out / "validation.jsonl").exists() and not (out / "validation").exists()
    train(workshop, out, validation=LOOKED)
    train(workshop, tmp_path / "whole", validation=LOOKED)
    assert looked_at(out) == [4, 8]
    assert (out / "validation.jsonl").read_text() == (tmp_path / "whole" / "validation.jsonl").read_text()


def test_a_trace_names_the_parts_of_the_steps_asked_for(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(workshop, out, steps=8, profile=2)
    (trace,) = (out / "profile").iterdir()
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    marks = ("wait for samples", "features", "loss", "adapter", "network", "gradients", "optimizer")
    assert {mark: names.count(mark) for mark in marks} == dict.fromkeys(marks, 2 * 2)  # micro-batches
    train(workshop, tmp_path / "plain", steps=1)
    assert not (tmp_path / "plain" / "profile").exists()


def test_batches_go_through_a_pipe_where_there_is_too_little_shared_memory(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what all processes of the machine may have read ahead: four batches each, beside that in hand."""
    found: list[dict[str, torch.Tensor | np.ndarray]] = []
    unless_lost = batches._unless_lost

    def seen(loaded: Iterator[dict]) -> Iterator[dict]:
        return unless_lost(found.append(batch) or batch for batch in loaded)

    monkeypatch.setattr(batches, "_unless_lost", seen)
    plain = train(workshop, tmp_path / "plain", steps=3)
    need = 2 * (4 + 1) * sum(value.nbytes for value in found[0].values() if isinstance(value, torch.Tensor))
    for ranks, free, kind in ((1, 1.01, torch.Tensor), (1, 0.99, np.ndarray), (2, 1.99, np.ndarray)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(batches, "shared_memory", lambda free=free: free * need)
        found.clear()
        got = train(workshop, tmp_path / f"{ranks}-{free}", steps=3, workers=2)
        assert [type(batch["latents"]) for batch in found] == [kind] * 6, "tensors lie in shared memory"
        assert all(torch.equal(got[key], tensor) for key, tensor in plain.items())
