"""Face: pairs of pictures of one identity, half of the conditions zoomed to the face (CelebA; paper, Sec. 3.4)."""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ipadapter_instruct_core.tasks import Task
from pydantic import Field
from training.datasets.sample import Sample, decode_picture, encode_picture
from training.datasets.sources.builder import Item, Pictures, Source, chance
from training.datasets.sources.files import Place, read_text, shrunk
from training.datasets.sources.folders import LeftOut, Listing, inside, missing_from

POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
LANDMARKS = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")
BOX = ("x_1", "y_1", "width", "height")
# Side of a face's square as a multiple of the longer of: between the eyes, from the eyes to the mouth. In CelebA's
# aligned pictures (eyes 38 and mouth 41 pixels apart) it reaches from the forehead to below the chin.
FACE_SIDE = 2.8

Square = tuple[float, float, float]  # middle x, middle y, side; pixels


@dataclass(frozen=True, kw_only=True)
class FaceItem(Item):
    """``cuts`` are the squares to cut out of condition and target; None takes one whole."""

    cuts: tuple[Square | None, Square | None]


class Face(Source):
    """CelebA: pairs of different pictures of one identity, half of the conditions zoomed to the face.

    In-the-wild pictures are cut to the largest square around the face, since training and CLIP see the middle square.
    """

    kind: Literal["face"] = "face"
    """Which source this is."""
    identities: Path
    """identity_CelebA.txt."""
    images: Path
    """Folder of the pictures: img_celeba with --boxes, or img_align_celeba, whose 178 by 218 pixels are few."""
    landmarks: Path
    """list_landmarks_celeba.txt with --boxes, or list_landmarks_align_celeba.txt."""
    boxes: Path | None = None
    """list_bbox_celeba.txt, which belongs to the in-the-wild pictures; left out, the pictures are the aligned ones."""
    attributes: Path | None = None
    """list_attr_celeba.txt, from which prompts are put together; left out, each is "a photo of a person"."""
    pairs_per_identity: int = Field(4, ge=1)
    """At most this many pairs of one identity."""
    zoomed: float = Field(0.5, ge=0, le=1)
    """Share of the conditions that are zoomed to the face."""

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        pictures, listing = defaultdict(list), Listing()
        for name, (identity,) in _table(self.identities, "identity_CelebA.txt", ()).items():
            if inside(self.images, name) in listing:
                pictures[identity].append(name)
            else:
                yield missing_from(self.images, name)
        squares = self._squares()
        attributes = _attributes(self.attributes) if self.attributes else {}
        count = 0
        for identity in sorted(pictures):
            names = sorted(pictures[identity])
            random.Random(chance(seed, "identity", identity)).shuffle(names)
            if len(names) == 1:
                yield LeftOut(names[0], "there is no second picture of this person")
                continue
            pairs = list(zip(names, names[1:] + names[:1], strict=True))
            for condition, target in pairs[: self.pairs_per_identity]:
                zoom = int((count + 1) * self.zoomed) > int(count * self.zoomed)
                count += 1
                for name in (condition, target):
                    if name not in squares:
                        raise ValueError(f"{self.landmarks} or the boxes have no line for {name}; get them again.")
                yield FaceItem(
                    source_id=f"{condition}>{target}",
                    group=f"identity-{identity}",
                    task=Task.FACE,
                    condition=Place(inside(self.images, condition)),
                    target=Place(inside(self.images, target)),
                    prompt=attributes.get(target, "a photo of a person"),
                    cuts=(
                        squares[condition] if zoom else self._frame(squares[condition]),
                        self._frame(squares[target]),
                    ),
                )

    def _frame(self, square: Square) -> Square | None:
        """As large a square as there is around a face; aligned pictures have theirs in the middle."""
        return None if self.boxes is None else (*square[:2], math.inf)

    def _squares(self) -> dict[str, Square]:
        """The square of the face in each picture."""
        points = _table(self.landmarks, "list_landmarks_align_celeba.txt or list_landmarks_celeba.txt", LANDMARKS)
        if self.boxes is None:
            return {name: _aligned_square(values) for name, values in points.items()}
        boxes = _table(self.boxes, "list_bbox_celeba.txt", BOX)
        return {name: _wild_square(boxes[name], values) for name, values in points.items() if name in boxes}

    def make(self, item: Item, pictures: Pictures, size: int) -> Sample:
        assert isinstance(item, FaceItem)
        if pictures.target is None or pictures.condition == pictures.target:
            raise ValueError("condition and target are the same picture")
        ours, theirs = item.cuts
        cut = Pictures(_cut(pictures.condition, ours, size), _cut(pictures.target, theirs, size))
        return super().make(item, cut, size)


def _cut(content: bytes, square: Square | None, size: int) -> bytes:
    """The square out of an encoded picture, moved and shrunk to lie within it; encoded."""
    if square is None:
        return content
    image, (x, y, side) = decode_picture(content), square
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise ValueError(
            f"its face lies at {x:.0f}, {y:.0f}, outside of its {image.width} by {image.height} pixels: boxes and "
            "list_landmarks_celeba belong to in-the-wild pictures, list_landmarks_align_celeba to aligned ones"
        )
    side = max(1, round(min(side, *image.size)))
    left = min(max(0, round(x - side / 2)), image.width - side)
    top = min(max(0, round(y - side / 2)), image.height - side)
    return encode_picture(shrunk(image.crop((left, top, left + side, top + side)), size))


def _aligned_square(values: Sequence[int]) -> Square:
    """Around the eyes and the mouth."""
    xs, ys = values[0::2], values[1::2]
    eyes, mouth = (ys[0] + ys[1]) / 2, (ys[3] + ys[4]) / 2
    side = FACE_SIDE * max(abs(xs[1] - xs[0]), abs(mouth - eyes))
    return (sum(xs) - xs[2]) / 4, (eyes + mouth) / 2, side


def _wild_square(box: Sequence[int], points: Sequence[int]) -> Square:
    """Around the box and all landmarks."""
    x, y, width, height = box
    left, right = min(x, *points[0::2]), max(x + width, *points[0::2])
    top, bottom = min(y, *points[1::2]), max(y + height, *points[1::2])
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top)


def _lines(path: Path, what: str) -> list[list[str]]:
    """The words of each line; none of the first where it is the count."""
    lines = [line.replace(",", " ").split() for line in read_text(path, what).splitlines()]
    return [[], *lines[1:]] if lines and len(lines[0]) == 1 and lines[0][0].isdigit() else lines


def _header(lines: list[list[str]]) -> list[str]:
    return [name for name in next(filter(None, lines), []) if name != "image_id"]


def _table(path: Path, what: str, columns: Sequence[str]) -> dict[str, list[int]]:
    """CelebA's lists: a count, a header unless ``columns`` is empty, then a picture and its whole numbers a line.

    The .csv variants with an image_id column are read too.
    """
    lines = _lines(path, what)
    start = 0
    if columns:
        start = next((number for number, line in enumerate(lines) if line), 0)
        header = _header(lines)
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]}; {what} is expected.")
        places = [header.index(name) for name in columns]
        start += 1
    else:
        header, places = ["identity"], [0]
    rows = {}
    for number, line in enumerate(lines[start:], start=start + 1):
        if not line:
            continue
        try:
            values = [int(value) for value in line[1:]]
        except ValueError:
            values = []
        if len(values) != len(header):
            raise ValueError(
                f"{path}, line {number} is not a picture's name and {len(header)} whole numbers; {what} is expected."
            )
        rows[line[0]] = [values[place] for place in places]
    return rows


def _attributes(path: Path) -> dict[str, str]:
    """A prompt for each picture, put together from the attributes it has."""
    what = "list_attr_celeba.txt"
    names = _header(_lines(path, what)) or ["Male"]
    prompts = {}
    for picture, values in _table(path, what, names).items():
        has = {name for name, value in zip(names, values, strict=True) if value > 0}
        kind = ("young " if "Young" in has else "") + ("man" if "Male" in has else "woman")
        said = [name.replace("_", " ").lower() for name in names if name in has and name not in ("Male", "Young")]
        prompts[picture] = ", ".join([f"a photo of a {kind}", *said])
    return prompts
