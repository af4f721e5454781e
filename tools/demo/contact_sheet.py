"""A contact sheet: the reference picture at the left, rows of labelled pictures beside it, a line at the foot."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw
from training.evaluate.grids import fitting, font, wrapped

CELL, LABEL, CAPTION, LINE = 256, 20, 14, 19  # sides, font sizes and caption line height, in pixels
GAP, MARGIN, TITLE, SUBTITLE, FOOT = 22, 40, 34, 16, 16
LABEL_HEIGHT, CAPTION_LINES = 32, 2
PAPER, INK, GREY, FRAME = "#ffffff", "#16181d", "#646b78", "#d5d9e0"
CELL_HEIGHT = LABEL_HEIGHT + CELL + 8 + CAPTION_LINES * LINE


@dataclass(frozen=True)
class Cell:
    """A picture with a label above it and a smaller caption below it."""

    picture: Image.Image
    label: str
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """Pictures side by side. The left column holds a heading with an explanation, or a picture of its own."""

    heading: str
    about: str
    cells: list[Cell]
    left: Cell | None = None


def contact_sheet(title: str, subtitle: str, rows: list[Row], foot: str) -> Image.Image:
    """The whole sheet. Every row has the left column and as many equal columns as the longest row needs."""
    columns = max(len(row.cells) for row in rows)
    width = 2 * MARGIN + CELL + columns * (CELL + GAP) + GAP
    head = MARGIN + TITLE + 2 * LINE + GAP
    height = head + len(rows) * (CELL_HEIGHT + GAP) + LINE + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    inner = width - 2 * MARGIN
    _write(draw, MARGIN, MARGIN, title, TITLE, INK, inner)
    _write(draw, MARGIN, MARGIN + TITLE + 12, subtitle, SUBTITLE, GREY, inner)
    for index, row in enumerate(rows):
        top = head + index * (CELL_HEIGHT + GAP)
        if row.left:
            _draw_cell(sheet, row.left, MARGIN, top)
        else:
            _draw_heading(draw, row, MARGIN, top)
        for column, cell in enumerate(row.cells):
            _draw_cell(sheet, cell, MARGIN + CELL + 2 * GAP + column * (CELL + GAP), top)
    rule = MARGIN + CELL + GAP
    draw.line((rule, head, rule, head + len(rows) * (CELL_HEIGHT + GAP) - GAP), FRAME)
    _write(draw, MARGIN, height - MARGIN - LINE, foot, FOOT, INK, inner)
    return sheet


def _draw_cell(sheet: Image.Image, cell: Cell, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    _write(draw, left, top, cell.label, LABEL, INK, CELL)
    picture_top = top + LABEL_HEIGHT
    picture = _fitted(cell.picture)
    x, y = left + (CELL - picture.width) // 2, picture_top + (CELL - picture.height) // 2
    sheet.paste(picture, (x, y))
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
    for number, line in enumerate(wrapped(cell.caption, CAPTION, CELL, CAPTION_LINES)):
        draw.text((left, picture_top + CELL + 8 + number * LINE), line, GREY, font(CAPTION))


def _draw_heading(draw: ImageDraw.ImageDraw, row: Row, left: int, top: int) -> None:
    for line in wrapped(row.heading, LABEL, CELL, 3):
        draw.text((left, top), line, INK, font(LABEL))
        top += LABEL + 6
    for line in wrapped(row.about, CAPTION, CELL, 8):
        draw.text((left, top + 8), line, GREY, font(CAPTION))
        top += LINE


def _fitted(picture: Image.Image) -> Image.Image:
    """The whole picture, as large as a cell allows, its sides in proportion."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, colour: str, width: int) -> None:
    """One line, cut with an ellipsis where it is wider than `width` pixels."""
    draw.text((x, y), fitting(text, size, width), colour, font(size))
