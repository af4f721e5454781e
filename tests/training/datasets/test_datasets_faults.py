"""Sources that are not what was expected: one sentence that says what is wrong, before anything is built."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from pyarrow import parquet
from sources import celeba, coco, make_celeba, make_coco, make_commoncanvas, make_journeydb, make_styles, save
from training.datasets.sources.builder import Source
from training.datasets.sources.composition import Composition
from training.datasets.sources.own import Own
from training.datasets.sources.replication import Replication
from training.datasets.sources.style import Style
from training.datasets.splits import choose
from training.datasets.targets.settings import InstantStyle, Scribble


def journeydb(folder: Path) -> Source:
    return Replication(annotations=folder / "train_anno.jsonl", images=folder / "imgs")


def styles(folder: Path) -> Source:
    targets = InstantStyle(base=Path("b"), adapter=Path("a"), image_encoder=Path("e"))
    return Style(pictures=folder / "pictures", prompts=folder / "art.csv", targets=targets)


def commoncanvas(folder: Path, **settings: object) -> Source:
    targets = Scribble(base=Path("b"), controlnet=Path("c"))
    return Composition(pictures=folder / "cc", targets=targets, **settings)


def wild(folder: Path) -> Source:
    return celeba(folder, wild=True)


def make_commoncanvas_inside(folder: Path) -> Path:
    return make_commoncanvas(folder / "cc")


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def swap(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


FAULTS = [
    (make_journeydb, journeydb, remove("train_anno.jsonl"), "There is no .*train_anno.jsonl; JourneyDB's JSONL"),
    (make_journeydb, journeydb, write("train_anno.jsonl", ""), "The source holds no samples"),
    (make_journeydb, journeydb, write("train_anno.jsonl", '{"image": "a.jpg"}\n'), "line 1 has no field img_path"),
    (make_journeydb, journeydb, cut("train_anno.jsonl"), r"line \d+ is no JSON object; .*mend or remove it"),
    (make_journeydb, journeydb, swap("train_anno.jsonl", "./000/", "../../"), "leads out of .*imgs; the pictures"),
    (make_styles, styles, remove("art.csv"), "There is no .*art.csv; a .txt, .csv, .jsonl or .parquet list"),
    (
        make_styles,
        styles,
        write("art.csv", "artist,style\nx,y\n"),
        "has no column of texts; its columns are artist, style",
    ),
    (make_styles, styles, write("art.csv", "title\n\n"), "art.csv holds no texts"),
    (
        make_styles,
        styles,
        cut("pictures/train-00000-of-00002.parquet"),
        "00000-of-00002.parquet is no whole parquet file",
    ),
    (make_coco, coco, remove("captions.json"), r"There is no .*captions.json; COCO's captions_\*.json is expected"),
    (make_coco, coco, remove("instances.json"), r"There is no .*instances.json; COCO's instances_\*.json"),
    (make_coco, coco, cut("instances.json"), "instances.json is no whole JSON file"),
    (make_coco, coco, swap("instances.json", '"bbox"', '"box"'), "entry 0 of annotations has no field bbox"),
    (make_coco, coco, swap("instances.json", '"categories"', '"classes"'), "instances.json has no list categories"),
    (make_coco, coco, swap("captions.json", '"caption"', '"text"'), "entry 0 of annotations has no field caption"),
    (make_coco, coco, swap("instances.json", "000000000002", "../../../2"), "leads out of .*images"),
    (make_coco, coco, write("instances.json", "[]"), "instances.json is a list; COCO's"),
    (make_coco, coco, write("captions.json", "\xff"), "has no|is no"),
    (make_celeba, celeba, remove("identity_CelebA.txt"), "There is no .*identity_CelebA.txt"),
    (make_celeba, wild, remove("list_bbox_celeba.txt"), "There is no .*list_bbox_celeba.txt"),
    (make_celeba, celeba, remove("list_landmarks_align_celeba.txt"), "There is no .*list_landmarks_align_celeba.txt"),
    (make_celeba, celeba, write("identity_CelebA.txt", ""), "The source holds no samples"),
    (
        make_celeba,
        celeba,
        write("identity_CelebA.txt", "1.jpg 5\n2.jpg\n"),
        "line 2 is not a picture's name and 1 whole",
    ),
    (make_celeba, wild, swap("list_bbox_celeba.txt", "x_1", "left"), "list_bbox_celeba.txt has no column x_1"),
    (
        make_celeba,
        wild,
        cut("list_bbox_celeba.txt"),
        r"line \d+ is not a picture's name and 4 whole|have no line for 0000\d\d.jpg",
    ),
    (
        make_commoncanvas_inside,
        commoncanvas,
        cut("cc/part-00001.parquet"),
        "part-00001.parquet is no whole parquet file",
    ),
]


@pytest.mark.parametrize(("make", "source", "break_it", "message"), FAULTS)
def test_a_broken_source_is_told_in_a_sentence(tmp_path, make, source, break_it, message):
    make(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message) as told:
        choose(source(tmp_path).plan(0), validation=2, limit=None, seed=0)
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


OWN_FAULTS = [
    (
        {"condition": "a.jpg", "caption": "a cat"},
        "line 1 has the unknown field caption; the fields are condition, target",
    ),
    ({"prompt": "a cat"}, "line 1 needs a text in the field condition"),
    ({"condition": 5, "task": "face"}, "line 1 needs a text in the field condition"),
    ({"condition": "a.jpg", "prompt": "a cat"}, "line 1 names no task; add the field task, or set one of everything"),
    ({"condition": "a.jpg", "task": "faces"}, "line 1: the task faces is none of everything, style"),
    ({"condition": "../a.jpg", "task": "face"}, r"line 1: \.\./a.jpg leads out of"),
    ({"condition": "/etc/passwd", "task": "face"}, "line 1: /etc/passwd leads out of"),
    ({"condition": r"C:\\a.jpg", "task": "face"}, "line 1: .*a.jpg leads out of"),
    ({"condition": "a.jpg", "target": "x/../../b.jpg", "task": "face"}, "b.jpg leads out of"),
]


@pytest.mark.parametrize(("line", "message"), OWN_FAULTS)
def test_a_wrong_line_of_own_data_is_named(tmp_path, line, message):
    data = tmp_path / "data"
    data.mkdir()
    (data / "own.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        list(Own(data=data / "own.jsonl").plan(0))


def test_a_folder_of_own_data_needs_a_task_and_pictures(tmp_path):
    with pytest.raises(ValueError, match="No task is set for the folder"):
        list(Own(data=tmp_path).plan(0))
    with pytest.raises(ValueError, match="The source holds no samples"):
        choose(Own(data=tmp_path, task=Task.FACE).plan(0), validation=1, limit=None, seed=0)
    with pytest.raises(ValueError, match="There is no .*nowhere; a folder of pictures or a .jsonl file"):
        list(Own(data=tmp_path / "nowhere", task=Task.FACE).plan(0))


def test_columns_that_are_not_there_are_named(tmp_path):
    make_commoncanvas(tmp_path / "cc")
    with pytest.raises(
        ValueError, match="no column image that holds pictures; its columns are photoid, licensename, jpg"
    ):
        list(commoncanvas(tmp_path, picture_column="image").plan(0))
    with pytest.raises(ValueError, match="no column jpg that holds captions"):
        list(commoncanvas(tmp_path, caption_column="jpg").plan(0))
    parquet.write_table(pyarrow.table({"url": ["a"]}), tmp_path / "cc" / "part-00000.parquet")
    with pytest.raises(ValueError, match="has no column of pictures; its columns are url"):
        list(commoncanvas(tmp_path).plan(0))


def test_pictures_that_do_not_fit_their_annotation_are_not_used(tmp_path):
    source = coco(make_coco(tmp_path), mask=True)
    item = next(iter(source.plan(0)))
    save(item.condition.path, Image.new("RGB", (300, 451)))
    with pytest.raises(ValueError, match=r"has \(300, 451\) pixels, not \(451, 300\)"):
        source.make(item, item.read(), 512)
    faces = celeba(make_celeba(tmp_path / "faces"), zoomed=1)
    item = next(iter(faces.plan(0)))
    save(item.condition.path, Image.new("RGB", (20, 20)))
    with pytest.raises(ValueError, match="outside of its 20 by 20 pixels: boxes and list_landmarks_celeba belong to"):
        faces.make(item, item.read(), 512)
    save(item.condition.path, Image.open(item.target.path))
    item.target.path.write_bytes(item.condition.path.read_bytes())
    with pytest.raises(ValueError, match="condition and target are the same picture"):
        faces.make(item, item.read(), 512)
