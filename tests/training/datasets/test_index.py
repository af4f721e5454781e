"""The index says of every sample what the shard itself says, and what is damaged is met when it is read."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
from array import array
from pathlib import Path

import pytest
from ipadapter_instruct_core.tasks import Task
from training.datasets import index
from training.datasets.index import Shards, index_of
from training.datasets.shards import BLOCKS, Tally, write_shard
from training.files import write_json

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = [
    ("a-000000000", {"json": b'{"task": "object", "subject": "red boat"}', "safetensors": b"x" * 700}),
    ("a-000000001", {"condition.png": b"p" * 512, "json": b'{"task": "style"}', "safetensors": b""}),
    ("a-000000002", {"json": b'{"task": "object"}', "safetensors": b"z"}),
    ("a-" + "long" * 40, {"json": b'{"task": "object", "subject": "red boat"}', "safetensors": b"y" * 3000}),
]  # the last with a header of its own for its name, as tar has for names over 100 characters


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "object" / "train-00000.tar"
    path.parent.mkdir()
    write_shard(path, SAMPLES)
    return path


def with_record(path: Path, place: str = ".") -> Path:
    record = path.parent / place / f"{path.stem}.json"
    record.parent.mkdir(exist_ok=True)
    write_json(record, {"bytes": path.stat().st_size, "index": index_of(path)}, indent=None)
    return path


@pytest.mark.parametrize("place", [None, ".", BLOCKS], ids=["none", "encode", "build"])
def test_samples_are_those_of_the_shard(shard: Path, place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if place:
        with_record(shard, place)
        monkeypatch.setattr(index, "index_of", None)  # the shard is not walked
    tally = Tally(0.0)
    found = pickle.loads(pickle.dumps(Shards([shard, shard], tally)))
    assert len(found) == 8 and tally.seen == 8 and not tally.skipped
    for number in range(8):
        assert found.read(number) == SAMPLES[number % 4] and found[number] == SAMPLES[number % 4][1]
    assert found.readable == list(range(8))
    assert found.name(1) == "object/train-00000.tar/a-000000001"
    assert found.by_task == {Task.OBJECT: array("i", [0, 2, 3, 4, 6, 7]), Task.STYLE: array("i", [1, 5])}
    assert [found.subject(place) for place in range(4)] == ["red boat", "", "", "red boat"]


def test_the_same_where_the_system_has_no_pread(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pread")
    found = Shards([shard], Tally(0.0))
    assert [found[place] for place in range(4)] == [files for _, files in SAMPLES]


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "OPEN_FILES", 2)
    paths = [tmp_path / f"train-{n}.tar" for n in range(4)]
    for n, path in enumerate(paths):
        write_shard(path, [(f"{n}", {"json": b'{"task": "style"}', "n": str(n).encode()})])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    found = Shards(paths, Tally(0.0))
    assert [found[place]["n"] for place in (0, 1, 2, 3, 0, 2)] == [b"0", b"1", b"2", b"3", b"0", b"2"]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 2
        del found
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("allowed", "kept"), [(256, 64), (1024, 256), (2, 1), (2**20, 256), (-1, 256)])
def test_fewer_files_stay_open_than_the_system_allows(monkeypatch: pytest.MonkeyPatch, allowed: int, kept: int) -> None:
    """A Mac's terminal allows 256; -1 is for no bound."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, -1))
    assert index._open_files() == kept


def test_many_shards_are_read_where_few_files_may_be_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"train-{n:05d}.tar" for n in range(100)]
    for path in paths:
        with_record(write_shard(path, SAMPLES[:1]) and path)
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from pathlib import Path\n"
        "from training.datasets.index import Shards, Tally\n"
        "shards = Shards(sorted(map(Path, sys.argv[1:])), Tally(0))\n"
        "print(sum(bool(shards[place]) for place in range(len(shards))))\n"
    )
    arguments = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "100\n", done.stderr


def test_a_record_of_another_shard_does_not_count(shard: Path) -> None:
    """The shard was made again, and its record is not there yet."""
    with_record(shard)
    write_shard(shard, [(key, {**files, "more": bytes(20_000)}) for key, files in SAMPLES])
    assert Shards([shard], Tally(0.0))[0]["more"] == bytes(20_000)


def test_damage_is_counted_and_named(shard: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[:1500])
    wordless = tmp_path / "wordless.tar"
    write_shard(wordless, [("0", {"json": b'{"task": "sty', "n": b""}), ("1", {"n": b""}), ("2", SAMPLES[1][1])])
    tally = Tally(1.0)
    found = Shards([cut, wordless, tmp_path / "gone.tar"], tally)
    why = {name.rpartition("/")[2]: text for name, text in tally.skipped}
    assert why["0"].startswith("its words cannot be read (Unterminated string")
    assert why["1"] == "its words cannot be read ('json')"
    assert why["cut.tar"].startswith("not a whole shard (") and "gone.tar" in why
    assert found.by_task == {Task.STYLE: array("i", [2])}


def test_a_sample_damaged_since_is_told_when_it_is_read(shard: Path) -> None:
    with_record(shard)
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        second = archive.getmember("a-000000001.condition.png")
    content[second.offset : second.offset + 512] = bytes(range(1, 129)) * 4
    shard.write_bytes(content)
    found = Shards([shard], Tally(0.0))
    assert found[0] == SAMPLES[0][1]
    with pytest.raises(ValueError, match="its place in the shard is damaged"):
        found[1]
    assert json.loads(found[2]["json"]) == {"task": "object"}
