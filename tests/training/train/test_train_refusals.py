"""`train` refuses settings, data and models that do not fit one another, each in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load, save
from ipadapter_instruct_core.tasks import Task
from pydantic import ValidationError
from shards_of_photographs import save_shards
from tiny_base import save_sd15
from training.features import encode
from training.features.encode import EncodeConfig
from training.train.loop import accumulation
from training.train.settings import TrainConfig

from runs import settings, train


def test_features_of_another_base_are_refused(workshop: Path, features: Path, tmp_path: Path) -> None:
    save_sd15(tmp_path / "base", seed=5)
    with pytest.raises(
        ValueError,
        match=r"^The features in .*features were made with another vae than this base has \(\w{32}, not ",
    ):
        train(workshop, tmp_path / "run", base=tmp_path / "base")


def other_start(workshop: Path, tmp_path: Path, changed: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load(workshop / "start.safetensors").state_dict()
    changed(state)
    save(tmp_path / "other.safetensors", Adapter.from_state_dict(state))
    return tmp_path / "other.safetensors"


def without_last_layer(state: dict[str, torch.Tensor]) -> None:
    for part in ("to_k_ip", "to_v_ip"):
        del state[f"ip_adapter.7.{part}.weight"]


def with_wider_pictures(state: dict[str, torch.Tensor]) -> None:
    state["image_proj.proj_in.weight"] = torch.zeros(64, 1280)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param(
            without_last_layer,
            r"other.safetensors is for another base: it has 3 cross-attentions with tokens 32 wide, the base 4 ",
            id="base",
        ),
        pytest.param(
            with_wider_pictures,
            "other.safetensors reads image states 1280 wide, the image encoder gives 48; take the encoder that it",
            id="encoder",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    workshop: Path, features: Path, tmp_path: Path, changed: Callable[[dict[str, torch.Tensor]], None], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        train(workshop, tmp_path / "run", start=other_start(workshop, tmp_path, changed))


def test_a_start_that_is_no_adapter_is_refused(workshop: Path, features: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open_clip_model.safetensors is an OpenCLIP model, not an adapter"):
        train(workshop, tmp_path / "run", start=workshop / "clip" / "open_clip_model.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file .*nothing.safetensors; check its name and folder"):
        train(workshop, tmp_path / "other", start=tmp_path / "nothing.safetensors")


def test_a_task_without_samples_is_refused(workshop: Path, features: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^The data hold no samples of the task face; leave it out of `tasks`"):
        train(workshop, tmp_path / "run", tasks={"style": 1.0, "face": 0.5})
    with pytest.raises(ValueError, match="No task has a weight above 0"):
        train(workshop, tmp_path / "other", tasks={"style": 0.0})


def test_an_empty_dataset_is_told(workshop: Path, features: Path, tmp_path: Path) -> None:
    data = save_shards(tmp_path / "face", Task.FACE, count=0, validation=0)
    values = {"base": workshop / "base", "image_encoder": workshop / "clip", "resolution": 64, "device": "cpu"}
    with pytest.raises(ValueError, match=r"^There are no samples in .*face; build a dataset first\.$"):
        encode.run(EncodeConfig(data=[data], out=tmp_path / "features", **values))
    raw = {"features": None, "data": [data], "image_encoder": workshop / "clip", "resolution": 64}
    with pytest.raises(ValueError, match=r"^There are no train samples in .*face; build or encode a dataset first\.$"):
        train(workshop, tmp_path / "run", **raw)


def test_data_without_validation_samples_train_without_validation(workshop: Path, tmp_path: Path) -> None:
    data = save_shards(tmp_path / "style", Task.STYLE, count=4, validation=0)
    raw = {"features": None, "data": [data], "image_encoder": workshop / "clip", "resolution": 64, "steps": 1}
    with pytest.raises(
        ValueError, match=r"^There are no validation samples in .*first, or give --validation.every 0\.$"
    ):
        train(workshop, tmp_path / "run", validation={"every": 1}, **raw)
    train(workshop, tmp_path / "run", validation={"every": 0}, **raw)


@pytest.mark.parametrize(("batch", "micro", "processes"), [(7, 4, 1), (8, 2, 3), (8, 3, 2), (2, 1, 4)])
def test_a_batch_that_cannot_be_cut_is_refused(
    workshop: Path, tmp_path: Path, batch: int, micro: int, processes: int
) -> None:
    config = TrainConfig(**settings(workshop, tmp_path / "run", batch_size=batch, micro_batch_size=micro))
    with pytest.raises(ValueError) as caught:
        accumulation(config, processes)
    assert str(caught.value) == (
        f"batch_size {batch} cannot be cut into {processes} processes of micro-batches of {micro}; "
        f"choose a multiple of {micro * processes}."
    )


@pytest.mark.parametrize(("batch", "micro", "processes", "count"), [(512, 16, 4, 8), (8, 16, 2, 1), (8, 4, 1, 2)])
def test_a_batch_is_cut_into_equal_parts(
    workshop: Path, tmp_path: Path, batch: int, micro: int, processes: int, count: int
) -> None:
    config = TrainConfig(**settings(workshop, tmp_path / "run", batch_size=batch, micro_batch_size=micro))
    assert accumulation(config, processes) == count


def test_one_source_of_samples_is_asked_for(workshop: Path, tmp_path: Path) -> None:
    for values in ({"features": None}, {"data": [workshop / "data" / "style"]}):
        with pytest.raises(ValidationError, match="give either `features` "):
            TrainConfig(**settings(workshop, tmp_path / "run", **values))
    with pytest.raises(ValidationError, match="training from raw shards needs `image_encoder`"):
        TrainConfig(**settings(workshop, tmp_path / "run", features=None, data=[workshop / "data" / "style"]))


@pytest.mark.parametrize("change", [{"start": None}, {"projector": "ip-adapter-plus"}], ids=str)
def test_instruct_layers_alone_need_the_rest(workshop: Path, tmp_path: Path, change: dict[str, object]) -> None:
    values = {"trained": "instruct", "start": workshop / "start.safetensors", **change}
    with pytest.raises(ValidationError, match='`trained = "instruct"` needs a `start`, and a `projector` that reads'):
        TrainConfig(**settings(workshop, tmp_path / "run", **values))


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_every": 0},
        {"warmup": -1},
        {"workers": -1},
        {"max_grad_norm": -1.0},
        {"weight_decay": -0.1},
        {"seed": -1},
        {"max_skipped": 1.5},
        {"validation": {"every": -1}},
        {"validation": {"steps": 0}},
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused(workshop: Path, tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"(greater|less) than or equal to"):
        TrainConfig(**settings(workshop, tmp_path / "run", **change))
