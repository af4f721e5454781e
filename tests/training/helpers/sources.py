"""Small source datasets in their true on-disk formats, from photographs that scikit-image and scikit-learn ship.

Each function fills a folder and returns it; what it holds is in the function's docstring.
"""

import csv
import io
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import skimage
import sklearn
from PIL import Image, ImageEnhance, ImageOps
from pyarrow import parquet
from training.datasets.sources.face import Face
from training.datasets.sources.object import Object

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
PHOTOGRAPHS = {  # name: (file, what it shows)
    "astronaut": (SKIMAGE / "astronaut.png", "an astronaut in an orange suit in front of a flag"),
    "cat": (SKIMAGE / "chelsea.png", "a close portrait of a tabby cat"),
    "coffee": (SKIMAGE / "coffee.png", "a cup of espresso on a wooden table"),
    "rocket": (SKIMAGE / "rocket.jpg", "a rocket on its launch pad at dusk"),
    "motorcycle": (SKIMAGE / "motorcycle_left.png", "a red motorcycle in a garage"),
    "galaxies": (SKIMAGE / "hubble_deep_field.jpg", "thousands of distant galaxies on black"),
    "retina": (SKIMAGE / "retina.jpg", "the inside of an eye, all in orange"),
    "pagoda": (SKLEARN / "china.jpg", "a pagoda above a lake"),
    "flower": (SKLEARN / "flower.jpg", "an orange dahlia before dark leaves"),
}
LONGEST = 384  # pixels; small pictures make fast tests

# COCO's (x, y, width, height) in the full photographs, read off them by eye; True where an ellipse in the box fits.
OBJECTS = {
    "cat": [("cat", (33, 0, 344, 282), True)],
    "coffee": [("cup", (171, 18, 239, 289), True), ("spoon", (326, 66, 98, 260), False)],
    "astronaut": [("person", (25, 15, 335, 497), False)],
    "rocket": [("airplane", (307, 127, 30, 295), False)],  # under 5 % of the picture
    "motorcycle": [("motorcycle", (99, 77, 585, 375), False)],
    "pagoda": [("building", (62, 28, 292, 357), False)],
    "flower": [("potted plant", (171, 86, 275, 273), True)],
}
# The astronaut's face: box, then left eye, right eye, nose, left and right corner of the mouth as seen in the picture.
FACE_BOX = (170, 60, 105, 130)
FACE_POINTS = ((204, 107), (245, 107), (225, 125), (212, 146), (241, 146))
# The same five points in the 25 by 25 faces of scikit-image's LFW subset.
LFW_POINTS = ((8, 9), (16, 9), (12, 13), (9, 18), (16, 18))
POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
LANDMARK_NAMES = [f"{point}_{axis}" for point in POINTS for axis in "xy"]


@cache
def photograph(name: str) -> Image.Image:
    """A whole photograph, RGB."""
    return Image.open(PHOTOGRAPHS[name][0]).convert("RGB")


def variants(count: int) -> list[tuple[str, str, Image.Image]]:
    """(name, caption, picture): each photograph once, then mirrored, then crops of it; all of them different."""
    made = []
    for number in range(count):
        name = list(PHOTOGRAPHS)[number % len(PHOTOGRAPHS)]
        turn = number // len(PHOTOGRAPHS)
        image = photograph(name).copy()
        if turn % 2:
            image = ImageOps.mirror(image)
        if turn > 1:
            image = ImageOps.crop(image, border=8 * turn)
        image.thumbnail((LONGEST, LONGEST))
        made.append((f"{name}-{turn}", PHOTOGRAPHS[name][1] + (f", seen once more ({turn})" if turn else ""), image))
    return made


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(image))
    return path


def make_journeydb(folder: Path, count: int = 24) -> Path:
    """``train_anno.jsonl`` and ``imgs/000/…jpg``, ``imgs/001/…jpg``; prompts as Midjourney's are."""
    lines = []
    for number, (name, caption, image) in enumerate(variants(count)):
        place = f"./{number % 2:03d}/{name}.jpg"
        save(folder / "imgs" / place, image)
        lines.append(
            {"img_path": place, "prompt": f"{caption}, cinematic light --ar 3:2", "Task2": {"Caption": caption}}
        )
    (folder / "train_anno.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_styles(folder: Path, count: int = 12) -> Path:
    """``pictures/train-0000N-of-00002.parquet`` with the column image as `datasets` writes it, and ``art.csv``."""
    rows = [{"bytes": jpeg(image), "path": f"{name}.jpg"} for name, _, image in variants(count)]
    (folder / "pictures").mkdir(parents=True)
    for number in range(2):
        table = pyarrow.table({"image": rows[number::2]})
        parquet.write_table(table, folder / "pictures" / f"train-{number:05d}-of-00002.parquet", row_group_size=4)
    with open(folder / "art.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["artist", "style", "title"])
        writer.writerows(
            ["unknown", "impressionism", f"{what} {where}"]
            for what in ("A boat", "Two dancers", "An old mill", "A bowl of fruit")
            for where in ("by the sea", "in the evening", "under trees", "in the snow")
        )
    return folder


def make_coco(folder: Path) -> Path:
    """``instances.json`` with polygons, one crowd and one small object, ``captions.json`` with two each, ``images/``.

    Each photograph is there as it is and mirrored.
    """
    categories = sorted({name for objects in OBJECTS.values() for name, _, _ in objects})
    images, instances, captions = [], [], []
    for mirrored in (False, True):
        for photo, objects in OBJECTS.items():
            picture = photograph(photo)
            number = len(images) + 1
            file_name = f"{number:012d}.jpg"
            save(folder / "images" / file_name, ImageOps.mirror(picture) if mirrored else picture)
            images.append({"id": number, "file_name": file_name, "width": picture.width, "height": picture.height})
            for name, (x, y, width, height), is_round in objects:
                left = picture.width - x - width if mirrored else x
                instances.append(
                    {
                        "id": len(instances) + 1,
                        "image_id": number,
                        "category_id": categories.index(name) + 1,
                        "bbox": [float(left), float(y), float(width), float(height)],
                        "area": width * height * (math.pi / 4 if is_round else 1),
                        "segmentation": [_outline(left, y, width, height, is_round)],
                        "iscrowd": 0,
                    }
                )
            for text in (PHOTOGRAPHS[photo][1], f"A photograph of {PHOTOGRAPHS[photo][1]}."):
                captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
    crowd = {**instances[0], "id": len(instances) + 1, "iscrowd": 1, "bbox": [0.0, 0.0, 400.0, 290.0]}
    crowd["segmentation"] = {"counts": [0, 10], "size": [300, 451]}
    named = [{"id": number, "name": name, "supercategory": "thing"} for number, name in enumerate(categories, start=1)]
    instances_file = {"info": {}, "images": images, "annotations": [*instances, crowd], "categories": named}
    (folder / "instances.json").write_text(json.dumps(instances_file))
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    return folder


def _outline(x: int, y: int, width: int, height: int, is_round: bool) -> list[float]:
    """A polygon in COCO's order x, y, x, y, …: an ellipse, or the box."""
    if not is_round:
        return [float(value) for value in (x, y, x + width, y, x + width, y + height, x, y + height)]
    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    points = zip(x + width / 2 * (1 + np.cos(angles)), y + height / 2 * (1 + np.sin(angles)), strict=True)
    return [round(float(value), 2) for point in points for value in point]


def make_commoncanvas(folder: Path, count: int = 12) -> Path:
    """Two parquet files with the columns photoid, jpg (bytes) and blip2_caption."""
    folder.mkdir(parents=True)
    rows = variants(count)
    for number in range(2):
        share = rows[number::2]
        table = pyarrow.table(
            {
                "photoid": list(range(len(share))),
                "licensename": ["Attribution License"] * len(share),
                "jpg": pyarrow.array([jpeg(image) for _, _, image in share], pyarrow.binary()),
                "blip2_caption": [caption for _, caption, _ in share],
            }
        )
        parquet.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=4)
    return folder


def make_celeba(folder: Path, identities: int = 6, pictures: int = 4) -> Path:
    """``identity_CelebA.txt``, ``list_attr_celeba.txt`` and the pictures aligned and in the wild.

    ``img_align_celeba/`` with ``list_landmarks_align_celeba.txt``; ``img_celeba/`` with ``list_landmarks_celeba.txt``
    and ``list_bbox_celeba.txt``. Identity 1 is the astronaut, the others are faces of scikit-image's LFW subset; the
    pictures of one differ in light and mirroring.
    """
    faces = np.load(SKIMAGE / "lfw_subset.npy")
    who, aligned, wild, boxes, attributes = [], {}, {}, {}, {}
    for identity in range(1, identities + 1):
        for number in range(pictures):
            name = f"{(identity - 1) * pictures + number + 1:06d}.jpg"
            who.append(f"{name} {identity}")
            if identity == 1:
                source, box, points, crop = photograph("astronaut"), FACE_BOX, FACE_POINTS, (125, 10, 325, 255)
            else:
                grey = Image.fromarray((faces[identity] * 255).astype(np.uint8)).convert("RGB")
                source, crop = grey.resize((250, 250), Image.Resampling.BICUBIC), (23, 0, 227, 250)
                box, points = (20, 10, 210, 230), [(10 * x, 10 * y) for x, y in LFW_POINTS]
            picture, (boxes[name], wild[name]) = _varied(source, number, box, points)
            save(folder / "img_celeba" / name, picture)
            view = source.resize((178, 218), Image.Resampling.BICUBIC, box=crop)
            across, down = 178 / (crop[2] - crop[0]), 218 / (crop[3] - crop[1])
            moved = [(round((x - crop[0]) * across), round((y - crop[1]) * down)) for x, y in points]
            picture, (_, aligned[name]) = _varied(view, number, box, moved)
            save(folder / "img_align_celeba" / name, picture)
            attributes[name] = [1 if identity == 1 else -1, 1 if number % 2 else -1, 1 if identity == 2 else -1]
    (folder / "identity_CelebA.txt").write_text("\n".join(who) + "\n")
    _write_list(folder / "list_landmarks_align_celeba.txt", LANDMARK_NAMES, aligned)
    _write_list(folder / "list_landmarks_celeba.txt", LANDMARK_NAMES, wild)
    _write_list(folder / "list_bbox_celeba.txt", ["image_id", "x_1", "y_1", "width", "height"], boxes)
    _write_list(folder / "list_attr_celeba.txt", ["Smiling", "Young", "Male"], attributes)
    return folder


def _varied(image: Image.Image, number: int, box, points) -> tuple[Image.Image, tuple[list[int], list[int]]]:
    """Another picture of the same face, with its box and landmarks: odd ones are mirrored, all differ in light."""
    picture = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(0.8 + 0.1 * number)).enhance(1.1)
    x, y, width, height = box
    if number % 2:
        picture = ImageOps.mirror(picture)
        left, right, nose, left_mouth, right_mouth = [(image.width - 1 - px, py) for px, py in points]
        x, points = image.width - x - width, [right, left, nose, right_mouth, left_mouth]
    return picture, ([x, y, width, height], [value for point in points for value in point])


def _write_list(path: Path, header: list[str], rows: dict[str, list[int]]) -> None:
    """As CelebA's lists are: a count, a header, then columns filled up with blanks."""
    lines = [f"{name} " + " ".join(f"{value:>4d}" for value in values) for name, values in rows.items()]
    path.write_text("\n".join([str(len(rows)), " ".join(header) + " ", *lines]) + "\n")


def make_own(folder: Path, count: int = 14) -> Path:
    """``samples.jsonl`` of style, object and everything samples beside ``files/``; the target is left out at times."""
    lines = []
    for number, (name, caption, image) in enumerate(variants(count)):
        condition = save(folder / "files" / f"{name}.jpg", image).relative_to(folder).as_posix()
        line = {"condition": condition, "prompt": caption, "task": ("everything", "style", "object")[number % 3]}
        if line["task"] != "everything":
            target = save(folder / "files" / f"{name}-target.jpg", ImageOps.posterize(image, 3))
            line["target"] = target.relative_to(folder).as_posix()
        if line["task"] == "object":
            line["subject"] = name.partition("-")[0]
        lines.append(line)
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_own_folder(folder: Path, count: int = 10) -> Path:
    """Pictures in two subfolders, each with its caption in a .txt beside."""
    for number, (name, caption, image) in enumerate(variants(count)):
        path = save(folder / f"part{number % 2}" / f"{name}.jpg", image)
        path.with_suffix(".txt").write_text(f"{caption}\n")
    return folder


def coco(folder: Path, **settings: object) -> Object:
    """The settings that read what `make_coco` made."""
    files = {name: folder / f"{name}.json" for name in ("instances", "captions")}
    return Object(**files, images=folder / "images", **settings)


def celeba(folder: Path, wild: bool = False, **settings: object) -> Face:
    """The settings that read what `make_celeba` made."""
    where = (
        {"images": folder / "img_celeba", "landmarks": folder / "list_landmarks_celeba.txt"}
        if wild
        else {"images": folder / "img_align_celeba", "landmarks": folder / "list_landmarks_align_celeba.txt"}
    )
    boxes = folder / "list_bbox_celeba.txt" if wild else None
    return Face(identities=folder / "identity_CelebA.txt", boxes=boxes, **where, **settings)
