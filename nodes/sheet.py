"""Pictures side by side with words below them, as one picture."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, GAP = 192, 12  # a cell's side, so that words fit, and the space around it, in pixels
PAPER, INK = "#ffffff", "#16181d"
MOST_LINES = 3


class Cell(NamedTuple):
    """One picture [H, W, C] in 0-1, and what is written below it."""

    picture: Tensor
    label: str


def sheet_of(cells: Sequence[Cell], columns: int, left: Cell | None = None) -> Tensor:
    """All cells row by row, and a picture at the left of them; [1, H, W, 3] in 0-1.

    Every cell is as large as the first one's picture. Small pictures are enlarged by whole pixels.
    """
    first = cells[0].picture
    times = max(1, -(-SMALLEST // max(first.shape[:2])))
    width, height = first.shape[1] * times, first.shape[0] * times
    size = max(14, width // 18)
    pitch = height + MOST_LINES * (size + 4) + 2 * GAP
    rows = -(-len(cells) // columns)
    before = width + 3 * GAP if left is not None else GAP
    sheet = Image.new("RGB", (before + columns * (width + GAP), rows * pitch + GAP), PAPER)
    if left is not None:
        _draw(sheet, left, (GAP, GAP), (width, height), size)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        _draw(sheet, cell, (before + column * (width + GAP), GAP + row * pitch), (width, height), size)
    return torch.from_numpy(np.asarray(sheet).copy()).float().unsqueeze(0) / 255


def _draw(sheet: Image.Image, cell: Cell, place: tuple[int, int], room: tuple[int, int], size: int) -> None:
    pixels = (cell.picture.float().clamp(0, 1) * 255).byte().cpu().numpy()  # as Save Image cuts them off
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).convert("RGB")
    scale = min(room[0] / picture.width, room[1] / picture.height)
    fitted = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    how = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
    offset = place[0] + (room[0] - fitted[0]) // 2, place[1] + (room[1] - fitted[1]) // 2
    sheet.paste(picture.resize(fitted, how), offset)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(_lines(cell.label, room[0], size)):
        draw.text((place[0], place[1] + room[1] + 6 + number * (size + 4)), line, INK, _font(size))


def _lines(text: str, width: int, size: int) -> list[str]:
    """The words in lines of at most a width; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " …"]
    return [_cut(line, width, size) for line in lines]


def _cut(line: str, width: int, size: int) -> str:
    while len(line) > 2 and _font(size).getlength(line) > width:
        line = line.removesuffix("…")[:-1].rstrip() + "…"
    return line


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
