"""`build` end to end: shards and manifest of every source, splits that do not leak, and prompts from an endpoint."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_alike, pixels
from PIL import Image
from sources import (
    jpeg,
    make_celeba,
    make_coco,
    make_commoncanvas,
    make_journeydb,
    make_own,
    make_own_folder,
    make_styles,
    save,
    variants,
)
from training.build import BuildConfig, run
from training.canny import edge_map
from training.datasets.sample import Sample, decode_picture
from training.shards import Shards, Tally

ROOT = Path(__file__).resolve().parents[2]


class Turned:
    """A target maker that turns its condition upside down, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[int], list[str]]] = []

    def __call__(self, conditions, prompts, seeds, contents):
        self.asked.append((prompts, seeds, contents))
        return [condition.resize((512, 512)).rotate(180) for condition in conditions]


def journeydb(folder: Path, count: int = 24) -> dict:
    make_journeydb(folder, count)
    return {"kind": "replication", "annotations": folder / "train_anno.jsonl", "images": folder / "imgs"}


def styles(folder: Path) -> dict:
    make_styles(folder)
    targets = {"base": "base", "adapter": "adapter", "image_encoder": "encoder", "batch_size": 4}
    return {"kind": "style", "pictures": folder / "pictures", "prompts": folder / "art.csv", "targets": targets}


def commoncanvas(folder: Path) -> dict:
    targets = {"base": "base", "controlnet": "scribble", "size": 128}
    return {"kind": "composition", "pictures": make_commoncanvas(folder), "targets": targets}


def coco(folder: Path) -> dict:
    make_coco(folder)
    files = {name: folder / f"{name}.json" for name in ("instances", "captions")}
    return {"kind": "object", **files, "images": folder / "images"}


def celeba(folder: Path) -> dict:
    make_celeba(folder)
    return {
        "kind": "face",
        "identities": folder / "identity_CelebA.txt",
        "images": folder / "img_align_celeba",
        "landmarks": folder / "list_landmarks_align_celeba.txt",
    }


def own_file(folder: Path) -> dict:
    return {"kind": "own", "data": make_own(folder) / "samples.jsonl"}


def own_folder(folder: Path) -> dict:
    return {"kind": "own", "data": make_own_folder(folder), "task": "style"}


SOURCES = {  # source: (samples, of which validate, tasks)
    journeydb: (24, 2, {"everything"}),
    styles: (12, 1, {"style"}),
    coco: (12, 1, {"object"}),
    commoncanvas: (12, 1, {"composition"}),
    celeba: (24, 2, {"face"}),
    own_file: (14, 1, {"everything", "style", "object"}),
    own_folder: (10, 1, {"style"}),
}


def build(source: dict, out: Path, maker=None, **settings: object) -> dict:
    """The manifest of a small build."""
    run(BuildConfig(source=source, out=out, **{"samples_per_shard": 5, "size": 96, **settings}), maker)
    return json.loads((out / "manifest.json").read_text())


def samples_of(out: Path, split: str) -> list[Sample]:
    shards = Shards(sorted(out.glob(f"{split}-*.tar")), Tally(0))
    return [Sample.from_members(shards[index]) for index in range(len(shards))]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


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
                identities = [{sample.group for sample in samples} for samples in (train, held_out)]
                assert all("identity-3" not in groups for groups in identities), "it goes by the name of identity 1"


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


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI-compatible server that describes every picture in its own words, and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            picture = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:8]
            answer = json.dumps({"choices": [{"message": {"content": f"A photo called {picture} of something."}}]})
            self.send_response(500 if self.path.startswith("/broken") else 200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_prompts_from_an_endpoint_are_asked_for_once(tmp_path, endpoint):
    url, asked = endpoint
    source = coco(tmp_path / "source")
    settings = {"prompts": "endpoint", "endpoint": {"url": f"{url}/v1", "cache": tmp_path / "cache"}}
    build(source, tmp_path / "a", **settings)
    assert len(asked) == 12
    made = samples_of(tmp_path / "a", "train")
    assert all(sample.prompt.startswith("A photo called ") for sample in made)
    assert len({sample.prompt for sample in made}) == len(made)
    subjects = [body["messages"][0]["content"][0]["text"].rpartition("mention the ")[2].rstrip(".") for body in asked]
    assert sorted(subjects) == sorted(["cat", "cup", "person", "motorcycle", "building", "potted plant"] * 2)
    build(source, tmp_path / "b", **settings)
    assert len(asked) == 12, "the second build asks nothing"
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert url not in (tmp_path / "a" / "manifest.json").read_text()


def test_an_endpoint_describes_the_condition_of_a_style(tmp_path, endpoint):
    url, asked = endpoint
    maker = Turned()
    settings = {"prompts": "endpoint", "endpoint": {"url": url, "cache": None}}
    build(styles(tmp_path / "source"), tmp_path / "out", maker, **settings)
    assert len(asked) == 12
    for sample in samples_of(tmp_path / "out", "train"):
        assert sample.condition_prompt.startswith("A photo called") and not sample.prompt.startswith("A photo")
    assert all(content.startswith("A photo called") for _, _, contents in maker.asked for content in contents)


def test_an_endpoint_that_fails_stops_or_is_skipped_as_asked(tmp_path, endpoint):
    url, _ = endpoint
    source = journeydb(tmp_path / "source", count=4)
    broken = {"url": f"{url}/broken", "attempts": 1, "cache": None}
    with pytest.raises(ValueError, match="gave no usable answer"):
        build(source, tmp_path / "a", prompts="endpoint", endpoint=broken)
    assert not list((tmp_path / "a").glob("*.tar"))
    with pytest.raises(ValueError, match="4 of 4 items could not be used .*the endpoint gave no prompt"):
        build(source, tmp_path / "b", validation=0, prompts="endpoint", endpoint={**broken, "on_failure": "skip"})


def test_from_the_command_line(tmp_path):
    source = celeba(tmp_path / "source")
    options = [f"--{name}={value}" for name, value in source.items() if name != "kind"]
    command = [sys.executable, "-m", "training", "build", "--out", "out", "--size", "96", "face", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 20 samples to train on and 2 to validate with, in 2 shards; 0 skipped.\n"
    (tmp_path / "source" / "identity_CelebA.txt").unlink()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("build: There is no ")
    assert done.stderr.endswith("identity_CelebA.txt is expected there.\n")
