"""`encode` is resumed, shared by ranks, added to, and reads ahead."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch
from encoded import SMALL_BANK, TASK, of_folder, samples_of, settings
from ipadapter_instruct_core.tasks import Task
from safetensors.torch import load_file
from training.datasets.sample import Sample
from training.datasets.shards import Tally, write_shard
from training.features import encode
from training.features.stored import FeatureSource


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few phrasings, since encoding thousands takes longest."""
    monkeypatch.setattr(encode, "load_bank", lambda: SMALL_BANK)


@pytest.mark.usefixtures("small_bank")
def test_what_is_done_is_not_done_again(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, interrupted = tmp_path / "once", tmp_path / "interrupted"
    encode.run(settings(workshop, once))
    encode_batch, calls = encode._encode_batch, []

    def third_fails(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_batch(*arguments)

    monkeypatch.setattr(encode, "_encode_batch", third_fails)
    with pytest.raises(KeyboardInterrupt):  # in the middle of the second shard
        encode.run(settings(workshop, interrupted, batch_size=2))
    shards = sorted((interrupted / TASK.value).glob("*.tar"))
    assert [path.name for path in shards] == ["train-00000.tar"]
    made = shards[0].stat().st_mtime_ns
    calls.clear()
    monkeypatch.setattr(encode, "_encode_batch", lambda *arguments: calls.append(arguments) or encode_batch(*arguments))
    encode.run(settings(workshop, interrupted, batch_size=4))
    assert len(calls) == 2 and shards[0].stat().st_mtime_ns == made
    found, expected = of_folder(interrupted), of_folder(once)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected if "train-00000" not in name)
    calls.clear()
    encode.run(settings(workshop, interrupted))
    assert calls == []


@pytest.mark.usefixtures("small_bank")
def test_ranks_share_the_shards(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        encode.run(settings(workshop, tmp_path / "two", Task.STYLE, TASK))
        names.append({str(path.relative_to(tmp_path)) for path in (tmp_path / "two").rglob("*.tar")})
    assert names[0] == {f"two/{task}/train-00001.tar" for task in ("style", "object")}
    assert len(names[1]) == 6
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    encode.run(settings(workshop, tmp_path / "one", Task.STYLE, TASK))
    assert of_folder(tmp_path / "two") == of_folder(tmp_path / "one")


@pytest.mark.usefixtures("small_bank")
def test_a_second_dataset_keeps_the_words_of_the_first(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode.run(settings(workshop, out, TASK))
    before = load_file(out / encode.INSTRUCTIONS)
    encode.run(settings(workshop, out, Task.STYLE))
    tables = load_file(out / encode.INSTRUCTIONS)
    assert "object/rocket" in before and tables.keys() == before.keys() | {"style"}
    assert all(torch.equal(tables[name], before[name]) for name in before)
    encode.run(settings(workshop, tmp_path / "one", TASK, Task.STYLE))
    assert of_folder(out) == of_folder(tmp_path / "one")
    written = (out / encode.INSTRUCTIONS).stat().st_ino
    encode.run(settings(workshop, out, TASK))
    assert (out / encode.INSTRUCTIONS).stat().st_ino == written  # nothing is new
    encode.run(settings(workshop, out, TASK, phrases_per_subject=2))
    assert len(load_file(out / encode.INSTRUCTIONS)["object/rocket"]) == 2


@pytest.mark.usefixtures("small_bank")
def test_words_are_read_without_the_features(workshop: Path, features: Path) -> None:
    assert FeatureSource(features, "train", Tally(0.0)).by_task.keys() == {Task.EVERYTHING, Task.STYLE, TASK}
    assert encode._tasks_and_subjects(settings(workshop, features))[1] >= {"rocket", "coffee"}


@pytest.mark.usefixtures("small_bank")
def test_lost_shards_are_made_again(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(workshop, tmp_path / "out")
    encode.run(config)
    made, folder = of_folder(tmp_path / "out"), tmp_path / "out" / TASK.value
    calls, encode_batch = [], encode._encode_batch
    monkeypatch.setattr(encode, "_encode_batch", lambda *arguments: calls.append(arguments) or encode_batch(*arguments))
    (folder / "train-00000.tar").unlink()
    for name in (
        f"{TASK.value}/.train-00000.tar.99",
        f"{TASK.value}/.train-00000.json.99",
        ".instructions.safetensors.99",
    ):
        (tmp_path / "out" / name).write_bytes(b"left by a killed run")
    (tmp_path / "out" / encode.INSTRUCTIONS).write_bytes(b"half")
    content = made[f"{TASK.value}/validation-00000.tar"]
    (folder / "validation-00000.tar").write_bytes(content[: len(content) // 2])
    encode.run(config)
    assert of_folder(tmp_path / "out") == made
    assert len(calls) == 2  # train-00001 was whole


@pytest.mark.usefixtures("small_bank")
def test_a_shard_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, swap = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or swap(*paths))
    write_shard(tmp_path / "train.tar", [("0", {"json": b"{}"})])
    assert done == [(tmp_path / "train.tar").stat().st_size, "replace"]


@pytest.mark.usefixtures("small_bank")
def test_pictures_are_decoded_side_by_side_and_ahead(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, ahead, pictures, encode_batch, decoded = Barrier(2), Event(), Sample.pictures, encode._encode_batch, []

    def meeting(sample: Sample) -> object:
        two.wait(timeout=20)  # one alone would end in BrokenBarrierError
        decoded.append(sample.source_id)
        if len(decoded) > 1:
            ahead.set()
        return pictures(sample)

    def slow(*arguments: object) -> object:
        assert ahead.wait(timeout=20), "the second is decoded only when the first was encoded"
        return encode_batch(*arguments)

    monkeypatch.setattr(Sample, "pictures", meeting)
    monkeypatch.setattr(encode, "_encode_batch", slow)
    encode.run(settings(workshop, tmp_path / "out", batch_size=1))
    for split in ("train", "validation"):
        found, expected = (samples_of(folder / TASK.value, split) for folder in (tmp_path / "out", features))
        assert [files["json"] for files in found] == [files["json"] for files in expected]
