"""The square of a picture that an image tower sees, chosen instead of its middle (paper, Sec. 3.4)."""

import random

import torch
from PIL import ImageColor
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .encoders import LONGEST_ASPECT

CENTER, TOP, BOTTOM, LEFT, RIGHT, PAD = PLACES = ("center", "top", "bottom", "left", "right", "pad")
BY_LOT = "random"
Box = tuple[int, int, int, int]  # top, left, height, width


def colour_of(words: str, lot: random.Random) -> tuple[int, ...]:
    """Red, green, blue in 0-255 of a name or #rrggbb, or one by ``lot``.

    Raises:
        ValueError: there is no such colour.
    """
    if words.strip().lower() == BY_LOT:
        return tuple(lot.randrange(256) for _ in range(3))
    try:
        return ImageColor.getrgb(words.strip())[:3]
    except (ValueError, AttributeError):
        raise ValueError(
            f"{words[:40]!r} is no colour; write a name such as teal, a value such as #7fb0c8, or random."
        ) from None


def framed(image: Tensor, box: Box, place: str, colour: Tensor, size: int) -> Tensor:
    """A square of ``size`` of what is in a box: the square at a place of it, or all of it padded with a colour.

    Args:
        image: [C, H, W] in 0-1.
        colour: [C] in 0-1.

    Returns:
        [C, size, size], rounded to 8 bits as an image tower's own preprocessing does.
    """
    top, left, height, width = box
    piece = image[:, top : top + height, left : left + width]
    if place != PAD:
        piece = _cut(piece, place, LONGEST_ASPECT * min(height, width))
    scale = size / (max if place == PAD else min)(piece.shape[1:])
    inner = max(round(piece.shape[1] * scale), 1), max(round(piece.shape[2] * scale), 1)
    if inner != tuple(piece.shape[1:]):
        piece = interpolate(piece.unsqueeze(0), size=inner, mode="bicubic", antialias=True)[0]
    if place != PAD:
        piece = _cut(piece, place, size)
    height, width = piece.shape[1:]
    above, before = (size - height) // 2, (size - width) // 2
    sides = (before, size - width - before, above, size - height - above)
    inside = pad(torch.ones_like(piece[:1]), sides)
    square = pad(piece, sides) * inside + colour.view(-1, 1, 1) * (1 - inside)
    return (square * 255).clamp(0, 255).round() / 255


def _cut(piece: Tensor, place: str, most: int) -> Tensor:
    """What lies at a place of [C, H, W], at most so long and wide."""
    down, along = max(piece.shape[1] - most, 0), max(piece.shape[2] - most, 0)
    top = {TOP: 0, BOTTOM: down}.get(place, down // 2)
    left = {LEFT: 0, RIGHT: along}.get(place, along // 2)
    return piece[:, top : top + most, left : left + most]


def box_around(mask: Tensor, margin: float, whole: bool) -> Box:
    """The box of a mask [H, W] and so much around it, as a share of its longer side.

    Args:
        whole: the box may be of any shape, for it is padded; else it is a square inside the picture, as training
            zooms to faces.

    Raises:
        ValueError: the mask is black everywhere.
    """
    rows, columns = (mask > mask.amax() / 2).nonzero(as_tuple=True)
    if len(rows) == 0:
        raise ValueError("The mask is black everywhere, so it shows nothing of the picture; paint the part to keep.")
    height, width = mask.shape
    top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
    longer = max(bottom - top, right - left)
    if whole:
        around = round(longer * margin / 2)
        top, left = max(top - around, 0), max(left - around, 0)
        return top, left, min(bottom + around, height) - top, min(right + around, width) - left
    side = max(1, min(round(longer * (1 + margin)), height, width))
    corner = ((top + bottom - side) // 2, (left + right - side) // 2)
    return min(max(corner[0], 0), height - side), min(max(corner[1], 0), width - side), side, side
