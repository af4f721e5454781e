"""Shards: what webdataset writes is read at any place; what is damaged is skipped, named and counted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from training.datasets.index import Shards
from training.datasets.shards import Tally, read_manifest, write_shard
from training.files import ranks, sha256, write_atomically, write_json

SAMPLES = 5


def contents(number: int) -> dict[str, bytes]:
    """Files of sizes on both sides of tar's blocks of 512 bytes."""
    random = np.random.default_rng(number)
    words = json.dumps({"n": number, "task": "style"}).encode()
    return {"json": words, "target": random.bytes(511 + number % 3)}


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    (tmp_path / "style").mkdir()
    paths = [tmp_path / "style" / f"train-{n:05d}.tar" for n in range(3)]
    for n, path in enumerate(paths):
        keys = range(n * SAMPLES, (n + 1) * SAMPLES)
        assert write_shard(path, [(f"{key:09d}", contents(key)) for key in keys]) == SAMPLES
    return paths


def test_samples_are_read_in_any_order(shards: list[Path]) -> None:
    tally = Tally(0.0)
    read = Shards(shards, tally)
    assert len(read) == 3 * SAMPLES
    for index in np.random.default_rng(0).permutation(len(read)).tolist():
        assert read[index] == contents(index)
    assert read.name(7) == "style/train-00001.tar/000000007"
    assert tally.skipped == []


def test_webdataset_reads_them_too(shards: list[Path]) -> None:
    from webdataset import WebDataset

    found = list(WebDataset([str(path) for path in shards], shardshuffle=False))
    assert [(sample["__key__"], sample["target"]) for sample in found] == [
        (f"{n:09d}", contents(n)["target"]) for n in range(3 * SAMPLES)
    ]


def test_the_same_samples_make_the_same_file(shards: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    write_shard(again, [(f"{n:09d}", contents(n)) for n in range(SAMPLES)])
    assert again.read_bytes() == shards[0].read_bytes()
    assert sha256(again) == hashlib.sha256(shards[0].read_bytes()).hexdigest()


def test_a_worker_process_gets_no_open_files(shards: list[Path]) -> None:
    read = Shards(shards, Tally(0.0))
    assert read[0] == contents(0)
    copy = pickle.loads(pickle.dumps(read))
    assert copy._files == {} and copy[11] == contents(11)


def cut_short(path: Path, share: float) -> None:
    """At 0.225 is the boundary of two samples, at 0.55 that of the last one and the zeros behind it."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.225, 0.3, 0.5, 0.55])
def test_a_truncated_shard_is_skipped_whole_and_named(shards: list[Path], share: float) -> None:
    cut_short(shards[1], share)
    tally = Tally(0.5)
    read = Shards(shards, tally)
    assert [read[index] for index in range(len(read))] == [
        contents(n) for n in [*range(SAMPLES), *range(2 * SAMPLES, 3 * SAMPLES)]
    ]
    [(name, why)] = tally.skipped
    assert name == "style/train-00001.tar" and why.startswith("not a whole shard (")


def test_a_missing_shard_is_skipped_and_named(shards: list[Path]) -> None:
    shards[2].unlink()
    tally = Tally(0.5)
    assert len(Shards(shards, tally)) == 2 * SAMPLES
    assert tally.skipped[0][0] == "style/train-00002.tar" and "No such file" in tally.skipped[0][1]


@pytest.mark.parametrize("member", range(2 * SAMPLES))
def test_no_damaged_header_hides_the_samples_behind_it(shards: list[Path], member: int) -> None:
    """For tarfile, a header that it cannot read is the end of the file."""
    with tarfile.open(shards[0]) as archive:
        place = archive.getmembers()[member].offset
    content = bytearray(shards[0].read_bytes())
    content[place + 20] ^= 0x55
    shards[0].write_bytes(content)
    tally = Tally(0.5)
    assert len(Shards(shards, tally)) == 2 * SAMPLES
    assert [name for name, _ in tally.skipped] == ["style/train-00000.tar"]


def test_a_lost_shard_counts_as_many_samples_as_the_others_hold(shards: list[Path]) -> None:
    cut_short(shards[1], 0.5)
    allowed, refused = Tally(0.34), Tally(0.33)
    for tally in (allowed, refused):
        Shards(shards, tally)
    assert allowed.seen == 15
    allowed.check()
    with pytest.raises(
        ValueError, match=r"^5 of 15 items could not be used \(style/train-00001.tar: not a whole .*; mend the source"
    ):
        refused.check()


def test_one_bad_item_among_the_first_ends_nothing_that_is_long() -> None:
    tally = Tally(0.01)
    tally.good(1000)
    for n in range(10):
        tally.lose(f"sample {n}", "damaged")
    tally.check()
    tally.lose("sample 10", "damaged")
    with pytest.raises(ValueError, match="^11 of 1000 items could not be used .*share of 0.01 that is allowed"):
        tally.check()


def test_where_the_end_is_unknown_twenty_items_decide() -> None:
    tally = Tally(0.1)
    tally.skip("first", "damaged")
    tally.good(17)
    tally.skip("second", "damaged")  # the 19th
    with pytest.raises(ValueError, match=r"^3 of 20 items could not be used \(first: damaged; second: damaged; third"):
        tally.skip("third", "damaged")


def failing_samples() -> Iterator[tuple[str, dict[str, bytes]]]:
    yield "000000000", contents(0)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"before")
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "train.tar", failing_samples())
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"]
    assert (tmp_path / "train.tar").read_bytes() == b"before"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"task": "süß"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"task": "süß"}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"half")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"] and b"task" in path.read_bytes()


def test_two_that_write_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two containers, processes may have the same number."""
    path, fsync, inside = tmp_path / "manifest.json", os.fsync, []

    def other_writes_meanwhile(file: int) -> None:
        if not inside:
            inside.append(file)
            write_atomically(path, b"the other's")
            assert path.read_bytes() == b"the other's"
        fsync(file)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "fsync", other_writes_meanwhile)
    write_atomically(path, b"its own")
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"] and path.read_bytes() == b"its own"


def test_a_folder_without_a_whole_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no manifest.json; make it with `python -m training encode`\.$"):
        read_manifest(tmp_path, "encode")
    (tmp_path / "manifest.json").write_text('{"task":')
    with pytest.raises(ValueError, match=r"manifest.json is damaged; run `python -m training build` again\.$"):
        read_manifest(tmp_path, "build")


@pytest.mark.parametrize(("rank", "world"), [("16", "16"), ("-1", "4"), ("1", None)])
def test_a_rank_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world: str | None) -> None:
    """As of a Slurm array from 1 to 16: the shards of rank 0 would be nobody's."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    last = int(world or 1) - 1
    with pytest.raises(ValueError, match=rf"^RANK is {rank}, but .* from 0 to {last}; .*--array=0-{last} does\.$"):
        ranks()
    monkeypatch.setenv("RANK", str(last))
    assert ranks() == (last, last + 1)
