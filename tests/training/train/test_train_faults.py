"""`train` meets damaged features, losses that are no numbers, a full disk and settings that do not fit."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ipadapter_instruct_core.tasks import Task
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from training.cli.verbs import sentence
from training.datasets.index import Shards
from training.datasets.shards import Tally, write_shard
from training.features.draws import Draws, Dropout
from training.train import checkpoints, state
from training.train.validation import Validator

from runs import command, environment, train

TASKS = (Task.EVERYTHING, Task.STYLE, Task.OBJECT)
Member = dict[str, bytes]


@pytest.fixture
def shop(workshop: Path, features: Path, tmp_path: Path) -> Path:
    """The workshop with features of its own, to be damaged."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name in ("base", "clip", "data", "start.safetensors"):
        (folder / name).symlink_to(workshop / name)
    shutil.copytree(features, folder / "features")
    return folder


def change(shop: Path, task: Task, number: int, changed: Callable[[Member], Member]) -> str:
    """Put another content into one training sample of features; returns its name."""
    path = shop / "features" / task.value / f"train-{number // 4:05d}.tar"
    shard = Shards([path], Tally(0.0))
    samples = list(map(shard.read, range(len(shard))))
    key, files = samples[number % 4]
    samples[number % 4] = key, changed(files)
    write_shard(path, samples)
    return f"{task.value}/{path.name}/{key}"


def with_zeroed_header(files: Member) -> Member:
    return {**files, "safetensors": bytes(16) + files["safetensors"][16:]}


def with_infinity(files: Member) -> Member:
    tensors = load_bytes(files["safetensors"])
    tensors["latent_mean"][0, 3, 5] = torch.inf
    return {**files, "safetensors": save_bytes(tensors)}


def slots(seed: int = 0) -> dict[tuple[Task, int], list[int]]:
    """At which of 8 steps each sample is drawn, by its number in its task."""
    draws = Draws(seed, {task: range(8) for task in Task}, dict.fromkeys(TASKS, 1.0), Dropout())
    found: dict[tuple[Task, int], list[int]] = {}
    for step in range(1, 9):
        for position in range(8):
            draw = draws.draw(step, position)
            found.setdefault((draw.task, draw.sample), []).append(step)
    return found


def first_drawn_after(step: int) -> tuple[Task, int]:
    """A sample, not its task's first, that a run meets only after so many steps."""
    return next(sample for sample, steps in slots().items() if min(steps) > step and sample[1] > 0)


def often_drawn() -> tuple[Task, int]:
    return max((sample for sample in slots() if sample[1] > 0), key=lambda sample: len(slots()[sample]))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        pytest.param(with_zeroed_header, "its features are damaged", id="features"),
        pytest.param(lambda files: {"json": files["json"]}, "'safetensors'", id="lacking"),
    ],
)
def test_a_damaged_sample_is_replaced_named_and_counted(
    shop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Member], Member], why: str
) -> None:
    whole = train(shop, tmp_path / "whole")
    task, number = often_drawn()
    drawn = len(slots()[task, number])
    name = change(shop, task, number, damage)
    found = train(shop, tmp_path / "damaged", max_skipped=0.5)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum(f"train: skipped {name}: " in message and why in message for message in warnings) >= drawn
    assert any(message.endswith(f"train: {len(warnings) - 1} damaged samples were skipped") for message in warnings)
    again = train(shop, tmp_path / "again", max_skipped=0.5, workers=2, micro_batch_size=4)
    assert all(torch.equal(found[key], again[key]) for key in found)
    assert any(not torch.equal(found[key], whole[key]) for key in found)


def test_the_first_sample_of_all_may_be_damaged(shop: Path, tmp_path: Path) -> None:
    for task in TASKS:
        change(shop, task, 0, with_zeroed_header)
    train(shop, tmp_path / "run", max_skipped=0.5, steps=2)


def test_too_many_damaged_samples_end_the_run(shop: Path, tmp_path: Path) -> None:
    name = change(shop, *often_drawn(), with_zeroed_header)
    with pytest.raises(ValueError, match=rf"^1 of \d\d items could not be used \({name}: its features are damaged"):
        train(shop, tmp_path / "run", max_skipped=0.01)


def test_words_that_cannot_be_read_are_skipped_at_the_start(
    shop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of features from before `encode` wrote an index: with it, they are not read."""
    for record in (shop / "features").glob("*/*-0000?.json"):
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "index"}))
    name = change(shop, Task.STYLE, 3, lambda files: {**files, "json": b'{"task": "sty' + files["json"]})
    with pytest.raises(ValueError, match=rf"^1 of 24 items could not be used \({name}: its words cannot be read"):
        train(shop, tmp_path / "refused", max_skipped=0.04)
    train(shop, tmp_path / "run", max_skipped=0.05, steps=1)
    assert f"train: skipped {name}: its words cannot be read" in caplog.text


def test_a_truncated_shard_is_skipped_and_named(shop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shop / "features" / "style" / "train-00001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"^4 of 24 items could not be used \(style/train-00001.tar: not a whole shard"
    ):
        train(shop, tmp_path / "refused", max_skipped=0.16)
    train(shop, tmp_path / "run", max_skipped=0.17, steps=1)
    assert "train: skipped style/train-00001.tar: not a whole shard" in caplog.text


def failing_reads(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], number: int) -> None:
    """From then on the disk gives no bytes from such places in a shard."""
    pread = os.pread

    def read(file: int, size: int, start: int) -> bytes:
        if fails(start):
            raise OSError(number, os.strerror(number))
        return pread(file, size, start)

    monkeypatch.setattr(os, "pread", read)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_the_disk_does_not_give_is_replaced_named_and_counted(
    workshop: Path,
    features: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """Nor its name, which is read from the shard; a sample to validate with is passed over like any."""
    failing_reads(monkeypatch, lambda start: start == 0, errno.EIO)  # of each shard's first sample
    looked = {"every": 3, "samples": 1, "pictures": 0}
    train(workshop, tmp_path / "run", max_skipped=0.9, steps=3, workers=workers, validation=looked)
    for name in ("train-00000", "validation-00000"):
        assert f"style/{name}.tar/byte 0" in caplog.text
    assert "Input/output error" in caplog.text
    assert len((tmp_path / "run" / "validation.jsonl").read_text().splitlines()) == 1


def test_a_validation_sample_that_is_lost_on_the_way_is_left_out(
    workshop: Path, features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second look the first of two can no longer be read, at the third none."""
    looks, look = [], Validator.__call__

    def counted(self: Validator, step: int, adapter: Any) -> dict[str, dict[str, float]]:
        looks.append(step)
        return look(self, step, adapter)

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Validator, "__call__", counted)
    failing_reads(monkeypatch, lambda start: len(looks) == 3 or (len(looks) == 2 and start == 0), errno.EIO)
    looked = {"every": 1, "samples": 2, "pictures": 1, "steps": 1}
    slow = {"learning_rate": 1e-12}  # so that nothing but the samples differs
    train(workshop, tmp_path / "run", steps=3, max_skipped=0.9, workers=0, validation=looked, **slow)
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines[1:]] == [sorted(lines[0]), ["step"]]
    both, one = (line["style"]["loss"] for line in lines[:2])
    assert one != pytest.approx(both, rel=1e-3)
    assert "skipped style/validation-00000.tar/byte 0: [Errno 5]" in caplog.text
    assert "step 3, held out: no sample could be read" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_cannot_be_opened_are_no_damage(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    failing_reads(monkeypatch, lambda start: True, errno.EMFILE)
    with pytest.raises(ValueError, match=r"^No more files can be opened \(.*Too many.*\); lower `workers`, or"):
        train(workshop, tmp_path / "run", workers=workers)
    with pytest.raises(OSError, match="Too many"):
        train(workshop, tmp_path / "other", validation={"every": 1})


@pytest.mark.parametrize("workers", [0, 1])
def test_where_all_is_damaged_the_run_says_so(shop: Path, tmp_path: Path, workers: int) -> None:
    for number in range(8):
        change(shop, Task.STYLE, number, with_zeroed_header)
    with pytest.raises(
        ValueError, match=r"^10 samples in a row are damaged \(style/train-0000\d.tar/\d{9}, .*\): its features are dam"
    ) as caught:
        train(shop, tmp_path / "run", max_skipped=1.0, tasks={"style": 1.0}, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_of_raw_shards_is_replaced(
    workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(workshop / "data" / "style", tmp_path / "data" / "style"))
    shard = Shards([data / "train-00000.tar"], Tally(0.0))
    samples = list(map(shard.read, range(len(shard))))
    samples[1] = samples[1][0], {**samples[1][1], "target": samples[1][1]["target"][:900]}
    write_shard(data / "train-00000.tar", samples)
    raw = {"features": None, "data": [data], "image_encoder": workshop / "clip", "resolution": 64, "steps": 3}
    train(workshop, tmp_path / "run", max_skipped=0.5, **raw)
    assert "train: skipped style/train-00000.tar/000000001: the picture cannot be read" in caplog.text


def test_a_loss_that_is_no_number_stops_and_names_the_sample(shop: Path, workshop: Path, tmp_path: Path) -> None:
    expected = train(workshop, tmp_path / "expected")
    out, (task, number) = tmp_path / "run", first_drawn_after(4)
    whole: list[Member] = []
    name = change(shop, task, number, lambda files: whole.append(files) or with_infinity(files))
    for _ in range(2):  # the same command meets it again, and nothing is lost by that
        with pytest.raises(ValueError) as caught:
            train(shop, out)
        step = 2 * -(-slots()[task, number][0] // 2)
        assert str(caught.value) == (
            f"The loss is no longer a number: first in the batch of {name}, at step {step} or shortly before; "
            f"{out}/checkpoints/step-00000004 is the last good checkpoint. Lower the learning rate, or look at these "
            "samples."
        )
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    change(shop, task, number, lambda files: whole[0])
    found = train(shop, out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_no_checkpoint_is_saved_after_a_loss_that_is_no_number(shop: Path, tmp_path: Path) -> None:
    change(shop, *first_drawn_after(0), with_infinity)
    with pytest.raises(ValueError, match="at step 8 or shortly before; no checkpoint was saved yet. Lower the"):
        train(shop, tmp_path / "run", log_every=100, checkpoint_every=8)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_weights_that_are_no_numbers_are_not_saved(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the loss was a number still, and the step after it too long."""

    def too_long(run: state.RunState) -> None:
        run.parameters["adapter.image_proj.proj_in.bias"].data[2] = torch.inf

    monkeypatch.setattr(state.RunState, "average", too_long)
    with pytest.raises(ValueError, match=r"^The weight image_proj.proj_in.bias is no longer a number; lower the learn"):
        train(workshop, tmp_path / "run", steps=1, snapshot_every=1)
    assert not list((tmp_path / "run").glob("checkpoints/step-*")) + list((tmp_path / "run").glob("snapshots/*"))


FULL = f"{os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})"


@pytest.mark.parametrize(
    ("function", "error"),
    [
        pytest.param("save_adapter", SafetensorError(f"Error while serializing: I/O error: {FULL}"), id="safetensors"),
        pytest.param("save_adapter", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), id="system"),
        pytest.param("torch.save", RuntimeError(f"PytorchStreamWriter failed writing file: {FULL}\nat"), id="torch"),
    ],
)
def test_a_disk_that_fills_up_leaves_the_checkpoints_before(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    expected = train(workshop, tmp_path / "expected")
    out = tmp_path / "run"
    kept = state.save_adapter if function == "save_adapter" else torch.save
    owner = state if function == "save_adapter" else torch

    def full(*arguments: object) -> None:
        place = str(arguments[0 if function == "save_adapter" else 1])
        if "step-00000008" in place:
            Path(place).write_bytes(b"half")
            raise error
        kept(*arguments)

    monkeypatch.setattr(owner, function.rpartition(".")[2], full)
    with pytest.raises(
        ValueError,
        match=r"^The checkpoint of step 8 could not be written \(.*No space left on[^\n]*\); make room",
    ):
        train(workshop, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    assert checkpoints.is_whole(out / "checkpoints" / "step-00000004")
    monkeypatch.undo()
    found = train(workshop, out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("a bug")])
def test_memory_that_runs_out_while_saving_is_no_full_disk(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(state, "get_state_dict", no_memory)
    with pytest.raises(type(error), match=str(error)[:5]):
        train(workshop, tmp_path / "run", steps=1)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    if isinstance(error, torch.OutOfMemoryError):
        assert sentence(error).startswith("The card's memory is full")


def test_a_really_full_disk(workshop: Path, features: Path, tmp_path: Path) -> None:
    """The same on a file system with room for one checkpoint, where the kernel lets us make one."""
    expected = train(workshop, tmp_path / "expected")
    size = sum(path.stat().st_size for path in (tmp_path / "expected" / "checkpoints" / "step-00000008").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = " ".join(command(workshop, disk / "run", checkpoint_every=2))
    (disk / "run.toml").rename(tmp_path / "run.toml")
    arguments = arguments.replace(str(disk / "run.toml"), str(tmp_path / "run.toml"))
    script = f"""
mount -t tmpfs -o size={int(1.6 * size) // 1024}k tmpfs {disk} || exit 77
{arguments}
echo $? >{tmp_path}/code
cp -r {disk}/run {tmp_path}/kept
"""
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        done = subprocess.run(unshared, env=environment(), cwd=environment()["PYTHONPATH"], capture_output=True,
                              text=True, timeout=120)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("unshare is not there")
    if not (tmp_path / "code").exists():
        pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
    assert (tmp_path / "code").read_text().strip() == "1"
    assert done.stderr.splitlines()[-1].startswith("train: The checkpoint of step 4 could not be written (")
    kept = tmp_path / "kept"
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["step-00000002"]
    shutil.rmtree(disk)
    kept.rename(tmp_path / "run")
    found = train(workshop, tmp_path / "run", checkpoint_every=2)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
