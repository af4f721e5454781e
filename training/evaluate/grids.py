"""Grids of pictures: the paper's Figs. 6, 8 and 9."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ipadapter_instruct_core.tasks import Task
from PIL import Image, ImageDraw, ImageFont, ImageOps
from training.datasets.sample import decode_picture
from training.evaluate.index import Picture

# In pixels. Large enough to be read where a README shows a sheet of 1,300 pixels at two thirds of its size.
CELL, GAP, MARGIN, SIDE = 256, 12, 24, 220
HEADING, CAPTION = 22, 17
HEADING_LINES, CAPTION_LINES = 2, 3
PAPER, INK, GREY = "#ffffff", "#16181d", "#565c68"


def models_grid(
    folder: Path, pictures: Sequence[Picture], rows: Sequence[str], tasks: Sequence[Task], examples: int, path: Path
) -> None:
    """Figs. 6 and 9: a line of the sheet is a condition and what each of ``rows`` made of it.

    Args:
        examples: how many lines a task at most.

    Raises:
        ValueError: a row is not in the index, or no row has a picture of these tasks, or a file cannot be read.
    """
    known = list(dict.fromkeys(picture.row for picture in pictures))
    for row in rows:
        if row not in known:
            raise ValueError(f'The index has no row "{row}"; its rows are {", ".join(known)}.')
    chosen = [made for task in tasks for made in _examples(pictures, rows, task)[:examples]]
    if not chosen:
        raise ValueError(f"No picture of {', '.join(rows)} is of the tasks {', '.join(task.value for task in tasks)}.")
    lines, titles = [], []
    for made in chosen:
        first = next(iter(made.values()))
        lines.append([_open(folder / first.condition), *(_open_made(folder, made.get(row)) for row in rows)])
        told = {picture.instruction for picture in made.values()}
        instruction = f"\n“{first.instruction}”" if len(told) == 1 else ""
        titles.append(f"{first.task.value.capitalize()}\n{first.prompt}{instruction}")
    grid(lines, titles, ["Condition", *rows], path)


def _examples(pictures: Sequence[Picture], rows: Sequence[str], task: Task) -> list[dict[str, Picture]]:
    """The pictures of each condition and prompt, by row; those that most of the rows have made go first."""
    made: dict[tuple[str, str, int], dict[str, Picture]] = {}
    for picture in pictures:
        if picture.task is task and picture.row in rows:
            made.setdefault((picture.condition, picture.prompt, picture.index), {})[picture.row] = picture
    distinct: dict[tuple[str, str], dict[str, Picture]] = {}
    for (condition, prompt, _), by_row in sorted(made.items(), key=lambda item: -len(item[1])):
        distinct.setdefault((condition, prompt), by_row)
    return list(distinct.values())


def rewordings_grid(
    folder: Path, pictures: Sequence[Picture], row: str, wordings: int, examples: int, path: Path
) -> bool:
    """Fig. 8: a line of the sheet is a condition and what one row made of it when told in several wordings.

    Returns:
        False, and nothing is written, where the row has no condition and prompt with two wordings.
    """
    told: dict[tuple[Task, str, str], dict[str, Picture]] = {}
    for picture in pictures:
        if picture.row == row:
            told.setdefault((picture.task, picture.condition, picture.prompt), {})[picture.instruction] = picture
    several = [(key, list(made.values())[:wordings]) for key, made in told.items() if len(made) > 1][:examples]
    if not several:
        return False
    columns = max(len(made) for _, made in several)
    lines, titles, captions = [], [], []
    for (task, condition, prompt), made in several:
        blank = [None] * (columns - len(made))
        lines.append([_open(folder / condition), *(_open_made(folder, picture) for picture in made), *blank])
        titles.append(f"{task.value.capitalize()}\n{prompt}")
        captions.append(["", *(f"“{picture.instruction}”" for picture in made), *([""] * len(blank))])
    grid(lines, titles, ["Condition", row, *[""] * (columns - 1)], path, captions)
    return True


def _open_made(folder: Path, picture: Picture | None) -> Image.Image | None:
    return None if picture is None else _open(folder / picture.name)


def _open(path: Path) -> Image.Image:
    try:
        return decode_picture(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"The picture {path} of the index cannot be read ({error}); run `evaluate` again.") from error


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_titles: Sequence[str],
    column_titles: Sequence[str],
    path: Path,
    captions: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write a sheet of pictures, each whole in a square of `CELL` pixels; None leaves the place empty.

    Args:
        row_titles: at the left; the first line is a heading, the rest smaller. All may be "", to save the space.
        column_titles: above the pictures, as many as the longest row has.
        path: its suffix chooses the format: .png, .jpg, .webp.
        captions: below each picture, in the shape of ``rows``.
    """
    captions = captions or [[""] * len(row) for row in rows]
    assert rows and len(rows) == len(row_titles) == len(captions)
    assert all(len(row) == len(below) <= len(column_titles) for row, below in zip(rows, captions, strict=True))
    side = SIDE + GAP if any(row_titles) else 0
    head = max(len(wrapped(title, HEADING, CELL, HEADING_LINES)) for title in column_titles) * _step(HEADING)
    texts_below = [[wrapped(text, CAPTION, CELL, CAPTION_LINES) for text in row] for row in captions]
    below = [max(len(lines) for lines in row) * _step(CAPTION) for row in texts_below]
    width = 2 * MARGIN + side + len(column_titles) * (CELL + GAP) - GAP
    height = 2 * MARGIN + head + sum(CELL + GAP + extra for extra in below)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    left, top = MARGIN + side, MARGIN
    for column, heading in enumerate(column_titles):
        lines = wrapped(heading, HEADING, CELL, HEADING_LINES)
        _write(draw, left + column * (CELL + GAP), top + head - len(lines) * _step(HEADING), lines, HEADING, INK)
    top += head + GAP
    for row, row_title, texts, extra in zip(rows, row_titles, texts_below, below, strict=True):
        _draw_row_title(draw, row_title, top)
        for column, (picture, caption) in enumerate(zip(row, texts, strict=True)):
            x = left + column * (CELL + GAP)
            if picture is not None:
                square = ImageOps.pad(picture.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS, PAPER)
                sheet.paste(square, (x, top))
            _write(draw, x, top + CELL + 4, caption, CAPTION, GREY)
        top += CELL + GAP + extra
    sheet.save(path, quality=85)


def _draw_row_title(draw: ImageDraw.ImageDraw, text: str, top: int) -> None:
    heading, *paragraphs = text.split("\n")
    lines = wrapped(heading, HEADING, SIDE, HEADING_LINES)
    _write(draw, MARGIN, top, lines, HEADING, INK)
    top += len(lines) * _step(HEADING) + 4
    for paragraph in paragraphs:
        lines = wrapped(paragraph, CAPTION, SIDE, 4)
        _write(draw, MARGIN, top, lines, CAPTION, GREY)
        top += len(lines) * _step(CAPTION) + 6


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], size: int, colour: str) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * _step(size)), line, colour, font(size))


def _step(size: int) -> int:
    """From one line to the next."""
    return round(1.3 * size)


def wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """The text in at most so many lines; what does not fit gives way to an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most:
        count = next((n for n in range(len(words), 1, -1) if _length(" ".join(words[:n]), size) <= width), 1)
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += "…"
    return [fitting(line, size, width) for line in lines]


def fitting(line: str, size: int, width: int) -> str:
    """The line, cut with an ellipsis where it is wider."""
    kept = line.removesuffix("…")
    while kept and _length(line, size) > width:
        kept = kept[:-1].rstrip()
        line = f"{kept}…"
    return line


def _length(text: str, size: int) -> float:
    return font(size).getlength(text)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface that matplotlib brings, since it knows more scripts than Pillow's own; headings are bold."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if size == HEADING else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)
