"""`evaluate` meets rows, files, settings and samples that do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load, save
from ipadapter_instruct_core.config import InstructionEncoder
from ipadapter_instruct_core.tasks import Task
from shards_of_photographs import save_shards
from training.datasets.index import Shards
from training.datasets.shards import Tally, write_shard
from training.evaluate import evaluate
from training.evaluate.evaluate import EvaluateConfig


def config(workshop: Path, out: Path, **changes: object) -> EvaluateConfig:
    values = {
        "rows": {"plain": {"all": workshop / "start.safetensors"}},
        "data": [workshop / "data" / "style"],
        "base": workshop / "base",
        "image_encoder": workshop / "clip",
        "scorer": workshop / "clip",
        "resolution": 64,
        "steps": 1,
        "samples": 1,
        "device": "cpu",
        "out": out,
    }
    return EvaluateConfig(**values | changes)


@pytest.mark.parametrize(
    ("row", "task", "told"),
    [
        pytest.param("a/b", "all", "The row's name 'a/b' cannot name a folder; leave out slashes", id="slash"),
        pytest.param("..", "all", r"The row's name '\.\.' cannot name a folder", id="dots"),
        pytest.param("conditions", "all", 'A row cannot be named "conditions", which is the folder of', id="taken"),
        pytest.param("x", "styles", "Row \"x\" names the task 'styles'; tasks are all, background, ", id="task"),
    ],
)
def test_rows_that_cannot_be_are_refused(workshop: Path, tmp_path: Path, row: str, task: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        evaluate.run(config(workshop, tmp_path / "out", rows={row: {task: workshop / "start.safetensors"}}))
    assert not (tmp_path / "out" / "table.md").exists()


def without_last_layer(plain: Adapter) -> Adapter:
    state = {key: tensor for key, tensor in plain.state_dict().items() if not key.startswith("ip_adapter.7.")}
    return Adapter.from_state_dict(state)


def of_open_clip(plain: Adapter) -> Adapter:
    adapter = plain.with_instruction(32, 32)
    assert adapter.config.instruction_encoder is InstructionEncoder.OPEN_CLIP
    return adapter


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param(without_last_layer, "other.safetensors is for another base: it has 3 cross-attentions", id="base"),
        pytest.param(
            lambda plain: plain.with_instruction(40),
            "other.safetensors reads instruction states 40 wide, the instruction encoder gives 32; take the encoder",
            id="width",
        ),
        pytest.param(
            of_open_clip,
            r"^other.safetensors reads instructions by open_clip, not clip_l; change --instruction-encoder\.$",
            id="encoder",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    workshop: Path, tmp_path: Path, changed: Callable[[Adapter], Adapter], told: str
) -> None:
    save(tmp_path / "other.safetensors", changed(load(workshop / "start.safetensors")))
    with pytest.raises(ValueError, match=told):
        evaluate.run(config(workshop, tmp_path / "out", rows={"other": {"all": tmp_path / "other.safetensors"}}))


def test_a_missing_adapter_is_told(workshop: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file .*nothing.bin; check its name and folder"):
        evaluate.run(config(workshop, tmp_path / "out", rows={"x": {"all": tmp_path / "nothing.bin"}}))


def test_a_folder_of_pictures_is_held_to_what_made_them(workshop: Path, tmp_path: Path) -> None:
    evaluate.run(config(workshop, tmp_path / "out"))
    before = (tmp_path / "out" / "plain" / "style" / "00000.jpg").read_bytes()
    for name, value, told in (("seed", 3, "seed = 0, not 3"), ("steps", 2, "steps = 1, not 2")):
        with pytest.raises(ValueError, match=rf"out holds pictures made with {told}; give it as it was, or another "):
            evaluate.run(config(workshop, tmp_path / "out", **{name: value}))
    other = load(workshop / "start.safetensors")
    other.image_proj.latents.data += 1
    save(tmp_path / "other.safetensors", other)
    rows = {"plain": {"all": tmp_path / "other.safetensors"}}
    with pytest.raises(
        ValueError, match=r"holds pictures made with the all adapter of plain = \w{12}…, not \w{12}…; give"
    ):
        evaluate.run(config(workshop, tmp_path / "out", rows=rows))
    added = {"more": rows["plain"]} | config(workshop, tmp_path / "out").rows
    evaluate.run(config(workshop, tmp_path / "out", rows=added, batch_size=1))
    assert (tmp_path / "out" / "plain" / "style" / "00000.jpg").read_bytes() == before
    assert (tmp_path / "out" / "more" / "style" / "00000.jpg").read_bytes() != before


def test_data_without_validation_samples_are_told(workshop: Path, tmp_path: Path) -> None:
    data = save_shards(tmp_path / "style", Task.STYLE, count=1, validation=0)
    with pytest.raises(ValueError, match="^The data hold no validation samples; build them with --validation of at"):
        evaluate.run(config(workshop, tmp_path / "out", data=[data]))


def test_a_damaged_sample_is_skipped_and_named(
    workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(workshop / "data" / "style", tmp_path / "style"))
    shard = Shards([data / "validation-00000.tar"], Tally(0.0))
    samples = list(map(shard.read, range(len(shard))))
    samples[0] = samples[0][0], {**samples[0][1], "condition": samples[0][1]["condition"][:700]}
    write_shard(data / "validation-00000.tar", samples)
    with pytest.raises(
        ValueError, match=r"^1 of 2 items could not be used \(style/validation-00000.tar/000000000: the"
    ):
        evaluate.run(config(workshop, tmp_path / "refused", data=[data], max_skipped=0.4))
    evaluate.run(config(workshop, tmp_path / "out", data=[data], max_skipped=0.5, samples=5))
    assert "evaluate: skipped style/validation-00000.tar/000000000: the picture cannot be read" in caplog.text
    assert [path.name for path in (tmp_path / "out" / "plain" / "style").iterdir()] == ["00000.jpg"]
