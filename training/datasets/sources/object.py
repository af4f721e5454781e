"""Object: an object cut out of a picture by its box, with the whole picture as the target (COCO; paper, Sec. 3.4)."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ipadapter_instruct_core.tasks import Task
from PIL import Image, ImageDraw
from pydantic import Field
from training.datasets.sample import decode_picture, encode_picture
from training.datasets.sources.builder import Item, Source, chance
from training.datasets.sources.files import Place, read_text, shrunk
from training.datasets.sources.folders import LeftOut, Listing, inside, missing_from

Box = tuple[int, int, int, int]  # left, top, right, bottom; pixels


@dataclass(frozen=True, kw_only=True)
class ObjectItem(Item):
    """``size`` is the picture's by its annotation, ``outline`` COCO's segmentation, ``colour`` pads and blanks."""

    box: Box
    size: tuple[int, int]
    outline: Any
    colour: tuple[int, int, int]


class Object(Source):
    """COCO: an object cut out by its box and padded to a square with a random colour; target = the whole picture."""

    kind: Literal["object"] = "object"
    """Which source this is."""
    instances: Path
    """COCO's instances_*.json."""
    captions: Path
    """COCO's captions_*.json of the same pictures."""
    images: Path
    """Folder of the pictures."""
    mask: bool = False
    """Blank what is in the box beside the object, in the colour of the padding."""
    smallest: float = Field(0.05, ge=0, le=1)
    """Objects whose box covers a smaller share of the picture are left out."""
    largest: float = Field(0.9, gt=0, le=1)
    """Objects whose box covers a larger share are left out, since the crop would be the target."""
    objects_per_picture: int = Field(1, ge=1)
    """How many objects of one picture are used, the largest first."""

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        what = "COCO's instances_*.json"
        instances = _read(self.instances, what)
        names = {
            category["id"]: category["name"]
            for category in _list(self.instances, instances, "categories", what, "id", "name")
        }
        objects = defaultdict(list)
        for annotation in _list(self.instances, instances, "annotations", what, "bbox", "category_id", "image_id"):
            if annotation["category_id"] not in names:
                raise ValueError(f"{self.instances} has no category {annotation['category_id']}; {what} is expected.")
            if not annotation.get("iscrowd"):
                objects[annotation["image_id"]].append(annotation)
        what = "COCO's captions_*.json"
        captions = defaultdict(list)
        for annotation in _list(self.captions, _read(self.captions, what), "annotations", what, "caption", "image_id"):
            captions[annotation["image_id"]].append(annotation["caption"].strip())
        listing = Listing()
        for picture in _list(
            self.instances, instances, "images", "COCO's instances_*.json", "file_name", "id", "width", "height"
        ):
            if inside(self.images, picture["file_name"]) not in listing:
                yield missing_from(self.images, picture["file_name"])
                continue
            boxed = [(annotation, _box(annotation, picture)) for annotation in objects[picture["id"]]]
            fitting = [(annotation, box) for annotation, box in boxed if self._fits(box, picture)]
            fitting.sort(key=lambda pair: (-_area(pair[1]), pair[0]["id"]))
            for annotation, box in fitting[: self.objects_per_picture]:
                yield self._item(seed, picture, annotation, box, names, captions[picture["id"]])

    def _fits(self, box: Box, picture: dict[str, Any]) -> bool:
        share = _area(box) / (picture["width"] * picture["height"])
        return _area(box) > 0 and self.smallest <= share <= self.largest

    def _item(
        self,
        seed: int,
        picture: dict[str, Any],
        annotation: dict[str, Any],
        box: Box,
        names: dict[int, str],
        captions: list[str],
    ) -> ObjectItem:
        source_id = f"{picture['file_name']}#{annotation['id']}"
        choice = random.Random(chance(seed, source_id))
        place = Place(inside(self.images, picture["file_name"]))
        return ObjectItem(
            source_id=source_id,
            group=picture["file_name"],
            task=Task.OBJECT,
            condition=place,
            target=place,
            prompt=choice.choice(captions) if captions else "",
            subject=names[annotation["category_id"]],
            box=box,
            size=(picture["width"], picture["height"]),
            outline=annotation.get("segmentation"),
            colour=(choice.randrange(256), choice.randrange(256), choice.randrange(256)),
        )

    def condition(self, item: Item, content: bytes, size: int) -> bytes:
        assert isinstance(item, ObjectItem)
        image = decode_picture(content)
        if image.size != item.size:
            raise ValueError(f"the picture has {image.size} pixels, not {item.size} as its annotation says")
        if self.mask:
            image = Image.composite(image, Image.new("RGB", image.size, item.colour), outline_mask(item))
        return encode_picture(shrunk(squared(image.crop(item.box), item.colour), size))


def squared(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side, the rest in one colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def outline_mask(item: ObjectItem) -> Image.Image:
    """COCO's polygons or uncompressed run lengths as a mask of the whole picture: 255 on the object, 0 elsewhere.

    Raises:
        ValueError: there is no outline, or it is compressed.
    """
    mask = Image.new("L", item.size)
    if isinstance(item.outline, list) and item.outline:
        draw = ImageDraw.Draw(mask)
        for polygon in item.outline:
            draw.polygon(polygon, fill=255)
        return mask
    counts = item.outline.get("counts") if isinstance(item.outline, dict) else None
    if not isinstance(counts, list):
        raise ValueError("its segmentation is neither polygons nor uncompressed run lengths")
    runs = np.repeat(np.arange(len(counts)) % 2 * 255, counts).astype(np.uint8)  # column by column, background first
    width, height = item.size
    if runs.size != width * height:
        raise ValueError(f"its segmentation covers {runs.size} pixels, not the picture's {width * height}")
    return Image.fromarray(runs.reshape(width, height).T.copy())


def _box(annotation: dict[str, Any], picture: dict[str, Any]) -> Box:
    """COCO's (x, y, width, height) as whole pixels within the picture."""
    x, y, width, height = annotation["bbox"]
    right, bottom = min(round(x + width), picture["width"]), min(round(y + height), picture["height"])
    return max(round(x), 0), max(round(y), 0), right, bottom


def _area(box: Box) -> int:
    left, top, right, bottom = box
    return max(0, right - left) * max(0, bottom - top)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no whole JSON file; {what} is expected; get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a {type(content).__name__}; {what} is expected, a JSON object.")
    return content


def _list(path: Path, content: dict[str, Any], name: str, what: str, *fields: str) -> list[dict[str, Any]]:
    """One list of a COCO file, its entries known to have the fields."""
    if not isinstance(content.get(name), list):
        raise ValueError(f"{path} has no list {name}; {what} is expected.")
    for number, entry in enumerate(content[name]):
        for field in fields:
            if not isinstance(entry, dict) or field not in entry:
                raise ValueError(f"{path}, entry {number} of {name} has no field {field}; {what} is expected.")
    return content[name]
