"""`build` end to end: shards and manifest of every source, and splits that do not leak."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from builds import (
    Turned,
    build,
    celeba,
    coco,
    commoncanvas,
    files_of,
    journeydb,
    own_file,
    own_folder,
    samples_of,
    styles,
)
from comparing import assert_alike, pixels
from PIL import Image
from sources import (
    jpeg,
    save,
    variants,
)
from training.datasets.sample import decode_picture
from training.datasets.targets.canny import edge_map

ROOT = Path(__file__).resolve().parents[3]


SOURCES = {  # source: (samples, of which validate, tasks)
    journeydb: (24, 2, {"everything"}),
    styles: (12, 1, {"style"}),
    coco: (12, 1, {"object"}),
    commoncanvas: (12, 1, {"composition"}),
    celeba: (24, 2, {"face"}),
    own_file: (14, 1, {"everything", "style", "object"}),
    own_folder: (10, 1, {"style"}),
}


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_source_becomes_shards_and_a_manifest(tmp_path, make):
    count, validation, tasks = SOURCES[make]
    out = tmp_path / "out"
    manifest = build(make(tmp_path / "source"), out, Turned())
    left_out = 2 if make is celeba else 0  # two pairs of an identity of four validate, and the others must not train
    assert manifest["counts"] == {"validation": validation, "train": count - validation - left_out}
    assert set(manifest["tasks"]) == tasks and sum(manifest["tasks"].values()) == count - left_out
    assert manifest["skipped"] == [] and manifest["settings"]["seed"] == 0
    shards = {shard["name"]: shard for shard in manifest["shards"]}
    assert sorted(shards) == sorted(path.name for path in out.glob("*.tar"))
    for name, shard in shards.items():
        assert shard["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        with tarfile.open(out / name) as archive:
            assert sum(member.name.endswith(".json") for member in archive) == shard["samples"] <= 5
    samples = samples_of(out, "train") + samples_of(out, "validation")
    assert len({sample.source_id for sample in samples}) == len(samples)
    for sample in samples:
        pictures = [decode_picture(picture) for picture in (sample.condition, sample.target) if picture]
        assert all(min(picture.size) <= 96 and np.asarray(picture).std() > 1 for picture in pictures)
        assert sample.prompt


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_nothing_leaks_from_validation(tmp_path, make):
    """No group and no picture of a validation sample is in training, whatever the seed."""
    source = make(tmp_path / "source")
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        build(source, out, Turned(), seed=seed, size=0)
        train, held_out = samples_of(out, "train"), samples_of(out, "validation")
        assert train and held_out
        assert not {sample.group for sample in train} & {sample.group for sample in held_out}
        pictures = [
            {picture for sample in samples for picture in (sample.condition, sample.target) if picture}
            for samples in (train, held_out)
        ]
        assert not pictures[0] & pictures[1]


def test_the_same_picture_under_two_names_is_in_one_split(tmp_path):
    """Own data, a parquet file and identities, each with many pictures twice."""
    lines = []
    for number, (name, caption, image) in enumerate(variants(12)):
        for twin in "ab":
            save(tmp_path / "own" / f"{twin}{name}.jpg", image)
            lines.append(
                {"condition": f"{twin}{name}.jpg", "prompt": caption, "task": "style", "group": f"{twin}{number}"}
            )
    (tmp_path / "own" / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [jpeg(image) for _, _, image in variants(9)]
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "cc").mkdir()
    for number in range(2):
        table = pyarrow.table({"jpg": rows, "caption": [f"picture {n}" for n in range(9)]})
        parquet.write_table(table, tmp_path / "cc" / f"{number}.parquet", row_group_size=4)
    faces = celeba(tmp_path / "faces")
    names = tmp_path / "faces" / "img_align_celeba"
    (names / "000009.jpg").write_bytes((names / "000001.jpg").read_bytes())  # identity 3 has a picture of identity 1
    scribble = {"base": "base", "controlnet": "scribble", "size": 128}
    sources = {
        "own": {"kind": "own", "data": tmp_path / "own" / "own.jsonl"},
        "cc": {"kind": "composition", "pictures": tmp_path / "cc", "targets": scribble},
        "faces": faces,
    }
    for name, source in sources.items():
        for seed in range(6):
            out = tmp_path / f"{name}-{seed}"
            build(source, out, Turned(), seed=seed, validation=2, size=0)
            train, held_out = samples_of(out, "train"), samples_of(out, "validation")
            assert len(held_out) == (1 if name == "cc" else 2)
            assert not {sample.condition for sample in train} & {sample.condition for sample in held_out}
            if name == "faces":
                told_apart = [
                    {"identity-1", "identity-3"} & {sample.group for sample in samples} for samples in (train, held_out)
                ]
                assert not all(told_apart), "the two share a picture, and are in one split whole"


def test_conditions_that_share_a_target_are_in_one_split(tmp_path):
    """40 conditions of own data with 10 targets, each one file."""
    pictures = variants(50)
    for number, (_, _, image) in enumerate(pictures):
        save(tmp_path / f"{number}.jpg", image)
    lines = [
        {"condition": f"{n}.jpg", "target": f"{40 + n % 10}.jpg", "prompt": caption, "task": "style"}
        for n, (_, caption, _) in enumerate(pictures[:40])
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for seed in range(4):
        out = tmp_path / f"out-{seed}"
        build({"kind": "own", "data": tmp_path / "own.jsonl"}, out, seed=seed, validation=4, size=0)
        train, held_out = samples_of(out, "train"), samples_of(out, "validation")
        assert len(held_out) == 4 and len(train) == 36
        assert not {sample.target for sample in train} & {sample.target for sample in held_out}


def test_as_many_validate_as_were_asked_for(tmp_path, caplog):
    source = journeydb(tmp_path / "source", count=40)
    assert build(source, tmp_path / "a", validation=3)["counts"] == {"validation": 3, "train": 37}
    assert not caplog.messages
    assert build(source, tmp_path / "b")["counts"] == {"validation": 4, "train": 36}
    assert "4 instead of 1000 samples validate: at most a tenth of the 40 here" in caplog.text
    assert build(source, tmp_path / "c", validation=0)["counts"] == {"validation": 0, "train": 40}


def test_a_limit_takes_samples_at_random_and_the_same_ones_again(tmp_path):
    source = journeydb(tmp_path / "source")
    manifest = build(source, tmp_path / "a", limit=12)
    assert manifest["counts"] == {"validation": 1, "train": 11}
    chosen = {sample.source_id for split in ("train", "validation") for sample in samples_of(tmp_path / "a", split)}
    build(source, tmp_path / "b", limit=20, validation=0)
    more = [sample.source_id for sample in samples_of(tmp_path / "b", "train")]
    assert len(more) == 20 and chosen < set(more)
    lines = (tmp_path / "source" / "train_anno.jsonl").read_text().splitlines()
    everything = [json.loads(line)["img_path"] for line in lines]
    assert more == [name for name in everything if name in more], "in the source's order"
    assert more != everything[:20]


def test_the_same_source_gives_the_same_bytes(tmp_path):
    for number, threads in enumerate((1, 7)):
        folder = tmp_path / f"source{number}"
        build(styles(folder / "styles"), folder / "out", Turned(), threads=threads, validation=3)
    one, other = (files_of(tmp_path / f"source{number}" / "out") for number in range(2))
    shards = [name for name in one if name.endswith(".tar")]
    assert len(shards) == 4 and all(one[name] == other[name] for name in shards)


def test_generated_targets(tmp_path):
    """What the generators are given, and that their pictures are the targets."""
    maker = Turned()
    build(styles(tmp_path / "styles"), tmp_path / "a", maker, validation=0, samples_per_shard=6)
    assert [len(prompts) for prompts, _, _ in maker.asked] == [4, 2, 4, 2], "in batches, shard after shard"
    made = samples_of(tmp_path / "a", "train")
    assert [sample.prompt for sample in made] == [prompt for prompts, _, _ in maker.asked for prompt in prompts]
    seeds = [seed for _, seeds, _ in maker.asked for seed in seeds]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    for sample in made:
        turned = (
            decode_picture(sample.condition).resize((512, 512)).rotate(180).resize((96, 96), Image.Resampling.LANCZOS)
        )
        assert_alike(pixels(sample.target), np.asarray(turned), 5)
    again = Turned()
    build(styles(tmp_path / "again"), tmp_path / "b", again, validation=0, samples_per_shard=3)
    assert [seed for _, seeds, _ in again.asked for seed in seeds] == seeds, "a seed for each sample, not its place"

    maker = Turned()
    build(commoncanvas(tmp_path / "cc"), tmp_path / "c", maker, validation=0)
    made = samples_of(tmp_path / "c", "train")
    assert [content for _, _, contents in maker.asked for content in contents] == [sample.prompt for sample in made]
    edges = edge_map(decode_picture(made[0].condition), 128).resize((512, 512)).rotate(180)
    assert_alike(pixels(made[0].target), np.asarray(edges.resize((96, 96), Image.Resampling.LANCZOS)), 5)


def test_from_the_command_line(tmp_path):
    source = celeba(tmp_path / "source")
    options = [f"--source.{name}={value}" for name, value in source.items() if name != "kind"]
    command = [sys.executable, "-m", "training", "build", "--out", "out", "--size", "96", "face", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 20 samples to train on and 2 to validate with, in 2 shards; 0 skipped.\n"
    (tmp_path / "source" / "identity_CelebA.txt").unlink()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("build: There is no ")
    assert done.stderr.endswith("identity_CelebA.txt is expected there.\n")
