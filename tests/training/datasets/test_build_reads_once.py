"""`build` reads each picture once, whatever the number of ranks, and still lets no picture into both splits."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from builds import Turned, build, celeba, files_of, samples_of
from PIL import Image
from pyarrow import parquet
from sources import jpeg, save
from training.datasets import twins
from training.datasets.sources import tables
from training.datasets.sources.files import Place

ROWS, ROW_GROUP = 400, 20


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each picture and each row group was read."""
    counted: Counter = Counter()
    cell, row_group = Place.read, parquet.ParquetFile.read_row_group

    def count_cell(place):
        counted[place] += 1
        return cell(place)

    def count_row_group(file, number, columns):
        counted["row groups"] += 1
        return row_group(file, number, columns=columns)

    monkeypatch.setattr(Place, "read", count_cell)
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", count_row_group)
    return counted


def noise(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def table(folder: Path, same: dict[int, int] | None = None) -> dict:
    """Two parquet files of ROWS pictures together; ``same`` names rows that hold the picture of another row."""
    folder.mkdir()
    rows = [jpeg(noise((same or {}).get(row, row))) for row in range(ROWS)]
    for number, start in enumerate((0, ROWS // 2)):
        half = range(start, start + ROWS // 2)
        columns = {"jpg": [rows[row] for row in half], "caption": [f"picture {row}" for row in half]}
        parquet.write_table(pyarrow.table(columns), folder / f"{number}.parquet", row_group_size=ROW_GROUP)
    targets = {"base": "base", "controlnet": "scribble", "size": 64}
    return {"kind": "composition", "pictures": folder, "targets": targets}


def build_by_ranks(source: dict, out: Path, monkeypatch: pytest.MonkeyPatch, world: int, **settings: object) -> dict:
    """One rank after another; a row group that one has read is not there for the next, as in processes."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        tables._row_group.cache_clear()
        manifest = build(source, out, Turned(), **settings)
    return manifest


def test_four_ranks_read_each_picture_and_row_group_once(tmp_path, monkeypatch, read):
    source = table(tmp_path / "source")
    manifest = build_by_ranks(source, tmp_path / "out", monkeypatch, 4, validation=40, samples_per_shard=30)
    assert manifest["counts"] == {"validation": 40, "train": 360}
    row_groups = read.pop("row groups")
    assert len(read) == ROWS and read.total() <= 1.1 * ROWS
    # Twenty, and again one at each of the three borders between ranks and one where validation ends.
    assert ROWS / ROW_GROUP <= row_groups <= ROWS / ROW_GROUP + 4


def test_a_part_of_a_table_reads_a_part_of_its_row_groups(tmp_path, monkeypatch, read):
    source = table(tmp_path / "source")
    build_by_ranks(source, tmp_path / "out", monkeypatch, 1, limit=60, validation=0)
    assert read.pop("row groups") == 3 and read.total() == 60
    chosen = {item.source_id for item in samples_of(tmp_path / "out", "train")}
    build_by_ranks(source, tmp_path / "other", monkeypatch, 1, limit=60, validation=0, seed=1)
    assert chosen != {item.source_id for item in samples_of(tmp_path / "other", "train")}, "at random"


def test_files_are_read_once_and_by_one_rank(tmp_path, monkeypatch, read):
    """Faces: each picture is a condition and a target, of one sample each."""
    source = celeba(tmp_path / "source")
    build_by_ranks(source, tmp_path / "out", monkeypatch, 3)
    assert read and set(read.values()) <= {1, 2} and read.total() == 2 * 22


def test_rows_of_the_same_picture_are_not_in_both_splits(tmp_path, monkeypatch):
    """Every row of the second file holds the picture of one of the first."""
    source = table(tmp_path / "source", {row: row - ROWS // 2 for row in range(ROWS // 2, ROWS)})
    for world in (1, 3):
        out = tmp_path / f"out{world}"
        manifest = build_by_ranks(source, out, monkeypatch, world, validation=40, samples_per_shard=30, size=0)
        held_out, train = samples_of(out, "validation"), samples_of(out, "train")
        assert not {sample.condition for sample in held_out} & {sample.condition for sample in train}
        twins_of = len({sample.condition for sample in held_out})  # of 40, where both of two validate
        assert manifest["counts"] == {"validation": 40, "train": len(train)}
        assert len(train) == ROWS - 2 * twins_of, "nothing else is lost"
        (left,) = manifest["left_out"]
        assert left["why"] == twins.WHY and left["count"] == len(left["names"]) == 2 * twins_of - 40
        assert sum(shard["samples"] for shard in manifest["shards"]) == ROWS - left["count"]
    one, other = (files_of(tmp_path / f"out{world}") for world in (1, 3))
    assert one["manifest.json"] == other["manifest.json"]
    assert all(one[name] == other[name] for name in one if name.endswith(".tar"))
    assert build_by_ranks(source, out, monkeypatch, 1, validation=40, samples_per_shard=30, size=0) == manifest
    assert files_of(out) == other, "once more changes nothing"


def test_a_kill_while_twins_are_taken_out_costs_nothing(tmp_path, monkeypatch):
    source = table(tmp_path / "source", {row: row - ROWS // 2 for row in range(ROWS // 2, ROWS)})
    expected = build_by_ranks(source, tmp_path / "whole", monkeypatch, 1, validation=40, size=0)
    written = []

    def kill(*arguments):
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    real = twins.finish_block  # called when the shard is written and before its note
    monkeypatch.setattr(twins, "finish_block", kill)
    with pytest.raises(KeyboardInterrupt):
        build_by_ranks(source, tmp_path / "out", monkeypatch, 1, validation=40, size=0)
    monkeypatch.setattr(twins, "finish_block", real)
    assert build_by_ranks(source, tmp_path / "out", monkeypatch, 1, validation=40, size=0) == expected
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "whole").keys()


def test_a_group_goes_whole_where_one_of_its_pictures_validates_elsewhere(tmp_path):
    for number in range(40):
        save(tmp_path / f"{number}.png", noise(number % 20))
    lines = [
        {"condition": f"{number}.png", "prompt": "a", "task": "style", "group": f"{number // 4}"}
        for number in range(40)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    build({"kind": "own", "data": tmp_path / "own.jsonl"}, out, validation=4, size=0)
    held_out, train = samples_of(out, "validation"), samples_of(out, "train")
    (group,) = {sample.group for sample in held_out}
    twin = str((int(group) + 5) % 10)  # groups of four: 0 to 3 are also 20 to 23
    assert {sample.group for sample in train} == {str(number) for number in range(10)} - {group, twin}
    assert len(train) == 32 and not {sample.condition for sample in train} & {sample.condition for sample in held_out}
