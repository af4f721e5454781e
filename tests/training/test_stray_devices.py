"""A training step on a card that is not there: a tensor on the wrong device fails on any machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absent_card import CARD, Card, backward, card
from accelerate import Accelerator
from ipadapter_instruct_core.tasks import Task
from shards_of_photographs import save_shards
from tiny_base import save_open_clip, save_sdxl
from tools.tiny.diffusers_models import save_ip_adapter_plus
from torch._subclasses.fake_tensor import unset_fake_temporarily
from training.train import loop
from training.train.log import RunLog
from training.train.settings import TrainConfig

from runs import settings

__all__ = ["card"]
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")


@pytest.fixture
def trainer(card: Card, monkeypatch: pytest.MonkeyPatch) -> Callable[..., loop.Trainer]:
    """Makes a run's trainer, with accelerate on the card; what is read of files is read before it goes there."""

    def real(function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            with unset_fake_temporarily():
                return function(*arguments)

        return call

    start = real(loop.start_adapter)
    monkeypatch.setattr(Accelerator, "device", CARD)
    monkeypatch.setattr(Accelerator, "backward", lambda _, loss: backward(loss))
    monkeypatch.setattr(loop, "identity", lambda *_: {})  # it hashes numbers, which fake weights have none of
    for name in ("load_data", "state_widths"):
        monkeypatch.setattr(loop, name, real(getattr(loop, name)))
    # Not by accelerate, after the optimiser was made: fake weights cannot be moved in place.
    monkeypatch.setattr(loop, "start_adapter", lambda *arguments: start(*arguments).to(CARD))

    def make(workshop: Path, out: Path, **changes: Any) -> loop.Trainer:
        config = TrainConfig(**settings(workshop, out, batch_size=4, ema=0.9, **changes))
        accelerator = Accelerator(cpu=True)
        accelerator.gradient_accumulation_steps = loop.accumulation(config, 1)
        with card:
            return loop.Trainer(config, accelerator)

    return make


def step(trainer: loop.Trainer, card: Card, out: Path) -> None:
    """One step of a batch that is loaded before, and what the log makes of it."""
    batches = iter([next(trainer._batches(0))])
    with card:
        trainer.log = RunLog(trainer.accelerator, out, 0, str)
        trainer._step(batches, told=True)
        trainer.log.check(1, out)
        trainer.log.line(1, 4, 1e-3)
    parameters = list(trainer.model.parameters())
    moments = trainer.optimizer.optimizer.state
    assert {each.device for each in parameters + list(trainer.state.averages.values())} == {CARD}
    assert all(moments[each]["exp_avg"].device == CARD for each in parameters)


def test_a_step_from_features(
    workshop: Path, features: Path, tmp_path: Path, card: Card, trainer: Callable[..., loop.Trainer]
) -> None:
    step(trainer(workshop, tmp_path), card, tmp_path)


def test_a_step_from_pictures_on_sdxl(tmp_path: Path, card: Card, trainer: Callable[..., loop.Trainer]) -> None:
    """With the encoders on the card, the pooled vector and the size numbers, and a frozen model in half precision."""
    save_ip_adapter_plus(tmp_path / "start.safetensors", save_sdxl(tmp_path / "base"))
    raw = {
        "features": None,
        "data": [save_shards(tmp_path / "data", Task.STYLE)],
        "image_encoder": save_open_clip(tmp_path / "clip"),
        "resolution": 64,
        "projector": "released",
        "precision": "bf16",
    }
    made = trainer(tmp_path, tmp_path / "run", **raw)
    step(made, card, tmp_path)
    with card:
        assert {states.device for states in made.encoders.rows().values()} == {CARD}
