"""Each source gives the samples that the paper describes, from files as they come on disk."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_alike, pixels
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from sources import (
    FACE_BOX,
    OBJECTS,
    PHOTOGRAPHS,
    celeba,
    coco,
    jpeg,
    make_celeba,
    make_coco,
    make_commoncanvas,
    make_journeydb,
    make_own,
    make_own_folder,
    make_styles,
    photograph,
    save,
    variants,
)
from training.datasets.sample import decode_picture
from training.datasets.sources.builder import Item, Source
from training.datasets.sources.composition import Composition
from training.datasets.sources.own import Own
from training.datasets.sources.replication import Replication
from training.datasets.sources.style import Style
from training.datasets.targets.canny import edge_map
from training.datasets.targets.settings import InstantStyle, Scribble

SCRIBBLE = Scribble(base=Path("base"), controlnet=Path("scribble"), size=256)
INSTANT_STYLE = InstantStyle(base=Path("base"), adapter=Path("adapter"), image_encoder=Path("encoder"))


def plan(source: Source, seed: int = 0) -> list[Item]:
    items = list(source.plan(seed))
    assert len({item.source_id for item in items}) == len(items)
    assert items == list(source.plan(seed)), "the same plan every time"
    return items


def test_replication_is_the_picture_with_its_own_prompt(tmp_path):
    folder = make_journeydb(tmp_path, count=4)
    source = Replication(annotations=folder / "train_anno.jsonl", images=folder / "imgs")
    items = plan(source)
    assert [item.source_id for item in items] == [
        f"./00{n % 2}/{name}.jpg" for n, (name, _, _) in enumerate(variants(4))
    ]
    sample = source.make(items[1], items[1].read(), size=512)
    assert sample.target is None and sample.task is Task.EVERYTHING
    assert sample.condition == (folder / "imgs" / "001" / "cat-0.jpg").read_bytes(), "a small JPEG stays as it is"
    assert sample.prompt == sample.condition_prompt == "a close portrait of a tabby cat, cinematic light --ar 3:2"


def test_pictures_of_one_prompt_are_one_group(tmp_path):
    lines = [{"img_path": f"{n}.jpg", "prompt": prompt} for n, prompt in enumerate(["A cat", "a cat ", "a dog"])]
    (tmp_path / "anno.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for line in lines:
        save(tmp_path / line["img_path"], photograph("cat"))
    groups = [item.group for item in plan(Replication(annotations=tmp_path / "anno.jsonl", images=tmp_path))]
    assert groups[0] == groups[1] != groups[2]


def test_style_pairs_pictures_with_titles_of_the_art_list(tmp_path):
    folder = make_styles(tmp_path)
    source = Style(pictures=folder / "pictures", prompts=folder / "art.csv", targets=INSTANT_STYLE)
    items = plan(source)
    with open(folder / "art.csv") as file:
        titles = [row["title"] for row in csv.DictReader(file)]
    prompts = [item.prompt for item in items]
    assert len(items) == 12 and set(prompts) < set(titles)
    assert len(set(prompts)) == 12, "no prompt comes again before all are used"
    assert [item.prompt for item in source.plan(1)] != prompts, "another seed, other prompts"
    conditions = [source.make(item, item.read(), size=0).condition for item in items]
    expected = [jpeg(image) for _, _, image in variants(12)]
    assert conditions == expected[0::2] + expected[1::2], "file after file, across row groups"
    sample = source.make(items[0], items[0].read(), size=128)
    assert sample.target is None and sample.task is Task.STYLE
    assert source.guide(sample) == decode_picture(sample.condition)
    assert source.described(sample, "a cat").prompt == sample.prompt, (
        "a description is the condition's, not the target's"
    )
    assert source.described(sample, "a cat").condition_prompt == "a cat"


def test_style_pictures_may_get_several_targets_each(tmp_path):
    folder = make_styles(tmp_path)
    source = Style(
        pictures=folder / "pictures", prompts=folder / "art.csv", targets=INSTANT_STYLE, targets_per_picture=2
    )
    items = plan(source)
    assert len(items) == 24 and len({item.group for item in items}) == 12
    assert all(one.prompt != other.prompt for one, other in zip(items[0::2], items[1::2], strict=True))


def test_an_object_is_cut_out_by_its_box_and_padded_to_a_square(tmp_path):
    source = coco(make_coco(tmp_path))
    items = plan(source)
    # Of seven photographs, each also mirrored: the rocket is too small, the spoon smaller than the cup of its picture.
    assert [item.subject for item in items] == ["cat", "cup", "person", "motorcycle", "building", "potted plant"] * 2
    cup = items[1]
    x, y, width, height = OBJECTS["coffee"][0][1]  # 239 by 289
    assert cup.source_id == "000000000002.jpg#2" and cup.box == (x, y, x + width, y + height)
    sample = source.make(cup, cup.read(), size=0)
    assert sample.target == (tmp_path / "images" / "000000000002.jpg").read_bytes()
    assert sample.prompt in (PHOTOGRAPHS["coffee"][1], f"A photograph of {PHOTOGRAPHS['coffee'][1]}.")
    condition = pixels(sample.condition)
    assert condition.shape == (289, 289, 3)
    left = (289 - 239) // 2
    whole = np.asarray(photograph("coffee"))
    assert_alike(condition[:, left : left + 239], whole[y : y + height, x : x + width], 5)
    for padding in (condition[:, : left - 2], condition[:, left + 239 + 2 :]):
        assert np.abs(padding - np.float32(cup.colour)).max() < 6
    colours = {item.colour for item in items}
    assert len(colours) == len(items), "a colour for each object"
    assert decode_picture(source.make(cup, cup.read(), size=128).condition).size == (128, 128)


def test_a_mask_blanks_what_is_beside_the_object(tmp_path):
    source = coco(make_coco(tmp_path), mask=True)
    flower = next(item for item in plan(source) if item.subject == "potted plant")
    condition = pixels(
        source.make(flower, flower.read(), size=0).condition
    )  # 275 by 273, an ellipse that fills the box
    across, down = np.meshgrid((np.arange(275) + 0.5) / 275 * 2 - 1, (np.arange(273) + 0.5) / 273 * 2 - 1)
    radius = across**2 + down**2
    crop = condition[1:274]
    x, y, width, height = OBJECTS["flower"][0][1]
    whole = np.asarray(photograph("flower"), dtype=np.float32)[y : y + height, x : x + width]
    assert np.abs(crop - whole)[radius < 0.9].mean() < 8  # two JPEGs of many petals
    assert np.abs(crop - np.float32(flower.colour))[radius > 1.12].mean() < 4


def test_a_mask_may_be_run_lengths(tmp_path):
    source = coco(make_coco(tmp_path), mask=True)
    instances = json.loads((tmp_path / "instances.json").read_text())
    cat = instances["annotations"][0]  # in a picture of 451 by 300; runs go down the columns
    cat["segmentation"] = {"size": [300, 451], "counts": [300 * 200, 300 * 100, 300 * 151]}  # columns 200 to 299
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    item = plan(source)[0]
    condition = pixels(
        source.make(item, item.read(), size=0).condition
    )  # box 33..377, so the object's columns are 167 to 266
    top = (344 - 282) // 2
    whole = np.asarray(photograph("cat"))
    assert_alike(condition[top : top + 282, 169:265], whole[:282, 202:298])
    assert np.abs(condition[top : top + 282, :163] - np.float32(item.colour)).mean() < 3
    assert np.abs(condition[top : top + 282, 271:] - np.float32(item.colour)).mean() < 3


def test_several_objects_of_one_picture_are_one_group(tmp_path):
    source = coco(make_coco(tmp_path), objects_per_picture=2, smallest=0.02)
    items = plan(source)
    assert [(item.subject, item.group) for item in items[1:3]] == [
        ("cup", "000000000002.jpg"),
        ("spoon", "000000000002.jpg"),
    ]
    assert sum(item.subject == "airplane" for item in items) == 2


def test_composition_follows_the_edges_of_the_captioned_picture(tmp_path):
    source = Composition(pictures=make_commoncanvas(tmp_path / "cc"), targets=SCRIBBLE)
    items = plan(source)
    rows = variants(12)
    assert [item.prompt for item in items] == [caption for _, caption, _ in rows[0::2] + rows[1::2]]
    sample = source.make(items[0], items[0].read(), size=512)
    assert sample.condition == jpeg(rows[0][2]) and sample.target is None and sample.task is Task.COMPOSITION
    assert sample.condition_prompt == sample.prompt
    assert source.guide(sample) == edge_map(decode_picture(sample.condition), 256)


def test_faces_are_pairs_of_one_identity_half_of_them_zoomed(tmp_path):
    source = celeba(make_celeba(tmp_path, identities=5, pictures=4))
    items = plan(source)
    identities = dict(line.split() for line in (tmp_path / "identity_CelebA.txt").read_text().splitlines())
    assert len(items) == 20, "four ordered pairs of four pictures"
    for item in items:
        condition, target = item.condition.path.name, item.target.path.name
        assert condition != target and identities[condition] == identities[target]
        assert item.group == f"identity-{identities[target]}"
    assert sum(item.cuts[0] is not None for item in items) == 10
    assert [sum(item.cuts[0] is not None for item in plan(celeba(tmp_path, zoomed=share))) for share in (0, 1)] == [
        0,
        20,
    ]
    plain = next(item for item in items if item.cuts[0] is None)
    assert source.make(plain, plain.read(), size=0).condition == plain.condition.path.read_bytes()
    assert [item.source_id for item in source.plan(1)] != [item.source_id for item in items], "another seed"


def test_zoom_shows_the_face_in_the_wild(tmp_path):
    source = celeba(make_celeba(tmp_path), wild=True, zoomed=1)
    item = next(item for item in plan(source) if item.condition.path.name == "000001.jpg")
    x, y, width, height = FACE_BOX  # 105 by 130, with all landmarks in it
    left = x + width / 2 - height / 2
    expected = Image.open(item.condition.path).crop((round(left), y, round(left) + 130, y + 130))
    assert_alike(pixels(source.make(item, item.read(), size=0).condition), np.asarray(expected))
    small = decode_picture(source.make(item, item.read(), size=64).condition)
    assert small.size == (64, 64)


def test_zoom_shows_the_face_in_aligned_pictures(tmp_path):
    make_celeba(tmp_path)
    # CelebA's own first line, for its aligned 178 by 218 pictures.
    (tmp_path / "list_landmarks_align_celeba.txt").write_text(
        "\n".join(
            ["8", (tmp_path / "list_landmarks_align_celeba.txt").read_text().splitlines()[1]]
            + [f"{n:06d}.jpg 69 109 106 113 77 142 73 152 108 154" for n in range(1, 9)]
        )
    )
    (tmp_path / "identity_CelebA.txt").write_text("\n".join(f"{n:06d}.jpg {(n - 1) // 4}" for n in range(1, 9)))
    source = celeba(tmp_path, zoomed=1)
    item = plan(source)[0]
    x, y, side = item.cuts[0]
    # Eyes at height 111 and mouth at 153: 42 apart, more than the 37 between the eyes.
    assert (x, y, side) == pytest.approx(((69 + 106 + 73 + 108) / 4, 132, 2.8 * 42))
    condition = decode_picture(source.make(item, item.read(), size=0).condition)
    assert condition.size == (118, 118)
    expected = Image.open(item.condition.path).crop((89 - 59, 132 - 59, 89 + 59, 132 + 59))
    assert_alike(np.asarray(condition, dtype=np.float32), np.asarray(expected))


def test_face_prompts_come_from_the_attributes(tmp_path):
    make_celeba(tmp_path)
    source = celeba(tmp_path, attributes=tmp_path / "list_attr_celeba.txt")
    prompts = {item.target.path.name: item.prompt for item in plan(source)}
    assert prompts["000001.jpg"] == "a photo of a woman, smiling"
    assert prompts["000002.jpg"] == "a photo of a young woman, smiling"
    assert prompts["000006.jpg"] == "a photo of a young man"
    assert {item.prompt for item in celeba(tmp_path).plan(0)} == {"a photo of a person"}


def test_celeba_lists_as_csv(tmp_path):
    make_celeba(tmp_path)
    attributes = tmp_path / "list_attr_celeba.txt"
    expected = plan(celeba(tmp_path, wild=True, attributes=attributes))
    for name in ("list_bbox_celeba", "list_landmarks_celeba", "list_attr_celeba"):
        lines = (tmp_path / f"{name}.txt").read_text().splitlines()[1:]
        rows = [",".join(line.split()) for line in lines]
        rows[0] = rows[0] if rows[0].startswith("image_id") else f"image_id,{rows[0]}"
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    assert plan(celeba(tmp_path, wild=True, attributes=attributes)) == expected


def test_own_data_from_a_file(tmp_path):
    folder = make_own(tmp_path)
    source = Own(data=folder / "samples.jsonl")
    items = plan(source)
    assert [item.task for item in items[:3]] == [Task.EVERYTHING, Task.STYLE, Task.OBJECT]
    whole, styled, thing = (source.make(item, item.read(), size=0) for item in items[:3])
    assert whole.target is None and whole.condition == (folder / "files/astronaut-0.jpg").read_bytes()
    assert styled.target == (folder / "files/cat-0-target.jpg").read_bytes()
    assert thing.subject == "coffee" and thing.prompt == PHOTOGRAPHS["coffee"][1]
    assert items[1].group == "files/cat-0.jpg"


def test_own_data_may_name_its_groups_and_leave_the_task_to_the_settings(tmp_path):
    save(tmp_path / "a.jpg", photograph("cat"))
    lines = [
        {"condition": "a.jpg", "prompt": "a cat", "group": "cats"},
        {"condition": "a.jpg", "prompt": "b", "task": "face"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = plan(Own(data=tmp_path / "own.jsonl", task=Task.POSE))
    assert [(item.group, item.task) for item in items] == [("cats", Task.POSE), ("a.jpg", Task.FACE)]


def test_own_data_from_a_folder_of_captioned_pictures(tmp_path):
    source = Own(data=make_own_folder(tmp_path), task=Task.STYLE)
    items = plan(source)
    assert len(items) == 10 and {item.task for item in items} == {Task.STYLE}
    by_id = {item.source_id: item for item in items}
    assert by_id["part1/cat-0.jpg"].prompt == PHOTOGRAPHS["cat"][1]
    assert source.make(by_id["part1/cat-0.jpg"], by_id["part1/cat-0.jpg"].read(), size=0).target is None


def test_pictures_in_the_wild_are_cut_to_the_largest_square_around_the_face(tmp_path):
    """The middle square of a tall picture, which training and CLIP see, may have no face in it."""
    make_celeba(tmp_path)
    faces = {}
    for path in sorted((tmp_path / "img_celeba").iterdir()):
        tall = Image.new("RGB", (300, 900), "navy")
        tall.paste(Image.open(path).resize((200, 200)), (20, 60))
        save(path, tall)
        faces[path.name] = "90 130 60 60"
    points = dict.fromkeys(faces, "100 140 140 140 120 150 105 170 135 170")
    for name, rows in (("list_bbox_celeba.txt", faces), ("list_landmarks_celeba.txt", points)):
        header = (tmp_path / name).read_text().splitlines()[:2]
        (tmp_path / name).write_text("\n".join([*header, *(f"{picture} {row}" for picture, row in rows.items())]))
    source = celeba(tmp_path, wild=True, zoomed=0.5)
    for item in plan(source)[:4]:
        sample = source.make(item, item.read(), size=0)
        whole = np.asarray(Image.open(item.target.path))
        # The face's middle is at height 160: 300 pixels around it are rows 10 to 309.
        assert_alike(pixels(sample.target), whole[10:310])
        condition = np.asarray(Image.open(item.condition.path))
        is_zoomed = decode_picture(sample.condition).size == (60, 60)
        expected = condition[130:190, 90:150] if is_zoomed else condition[10:310]
        assert_alike(pixels(sample.condition), expected)
    assert sum(decode_picture(source.make(i, i.read(), 0).condition).width == 60 for i in plan(source)) * 2 == 24
