"""Small builds: the settings that read what `sources.py` makes, and what comes out."""

import json
from pathlib import Path

from sources import (
    make_celeba,
    make_coco,
    make_commoncanvas,
    make_journeydb,
    make_own,
    make_own_folder,
    make_styles,
)
from training.datasets.build import BuildConfig, run
from training.datasets.index import Shards
from training.datasets.sample import Sample
from training.datasets.shards import Tally


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


def build(source: dict, out: Path, maker=None, **settings: object) -> dict:
    """The manifest of a small build; empty where it is not finished."""
    run(BuildConfig(source=source, out=out, **{"samples_per_shard": 5, "size": 96, **settings}), maker)
    manifest = out / "manifest.json"
    return json.loads(manifest.read_text()) if manifest.exists() else {}


def samples_of(out: Path, split: str) -> list[Sample]:
    shards = Shards(sorted(out.glob(f"{split}-*.tar")), Tally(0))
    return [Sample.from_members(shards[index]) for index in range(len(shards))]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
