"""Grids and the index of pictures: the right picture at the right place, told by its colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.evaluate import grids
from training.evaluate.figures import FiguresConfig, run
from training.evaluate.index import INDEX, Picture, read_index, write_index_line

TASKS = [Task.EVERYTHING, Task.STYLE, Task.OBJECT, Task.COMPOSITION, Task.FACE]
PALETTE = {"Joint": (200, 30, 40), "Single": (30, 160, 60), "IPAdapter+": (40, 60, 210)}
CONDITION = (240, 200, 20)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def refusal(config: FiguresConfig) -> str:
    with pytest.raises(ValueError) as caught:
        run(config)
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 330 and message.endswith("."), message
    return message


def picture_folder(tmp_path: Path, size: tuple[int, int] = (40, 40)) -> Path:
    """Three rows, five tasks, two conditions each; a picture's colour tells its row, its shade the task and index."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, task in enumerate(TASKS):
        for index in range(2):
            condition = f"{task.value}-{index}.png"
            Image.new("RGB", size, CONDITION).save(folder / condition)
            for row in PALETTE:
                add(folder, Picture(row, task, index, condition, f"a cat {index}", "use it"), number * 2 + index)
    return folder


def add(folder: Path, picture: Picture, shade: int) -> None:
    path = folder / picture.name
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(min(255, part + 2 * shade) for part in PALETTE[picture.row])
    Image.new("RGB", (40, 40), colour).save(path, quality=100)
    write_index_line(folder, picture)


def cell(image: np.ndarray, row: int, column: int, caption_height: int = 0) -> np.ndarray:
    """The colour in the middle of a place of a grid with one line of column titles and row titles."""
    head = grids.MARGIN + round(1.3 * grids.HEADING) + grids.GAP
    y = head + row * (grids.CELL + grids.GAP + caption_height) + grids.CELL // 2
    x = grids.MARGIN + grids.SIDE + grids.GAP + column * (grids.CELL + grids.GAP) + grids.CELL // 2
    return image[y, x]


def test_a_grid_puts_each_picture_in_its_place(tmp_path: Path) -> None:
    red, green = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("L", (80, 20), 100)
    path = tmp_path / "grid.png"
    grids.grid([[red, None], [green, red]], ["One\nwords", "Two"], ["A", "B"], path)
    image = pixels(path)
    side, gap, margin = 220 + 12, 12, 24
    assert image.shape == (2 * margin + 29 + 2 * (256 + gap), 2 * margin + side + 2 * 256 + gap, 3)
    top, left = margin + 29 + gap, margin + side
    assert (image[top : top + 256, left : left + 256] == (255, 0, 0)).all()
    assert (image[top : top + 256, left + 256 : left + 512 + gap] == 255).all()  # None
    second = image[top + 268 : top + 268 + 256, left : left + 256]
    assert (second[96:160] == 100).all() and (second[:94] == 255).all() and (second[162:] == 255).all()  # 80 x 20
    assert (image[top + 268 : top + 524, left + 268 : left + 524] == (255, 0, 0)).all()
    assert (image[top : top + 256, margin : margin + 220] < 128).any()  # the row's title
    assert (image[margin : margin + 29, left : left + 256] < 128).any()  # the column's


def test_a_grid_without_row_titles_saves_their_space(tmp_path: Path) -> None:
    path = tmp_path / "grid.webp"
    grids.grid([[Image.new("RGB", (8, 8))]], [""], [""], path)
    assert pixels(path).shape == (2 * 24 + 256 + 12, 2 * 24 + 256, 3)


def test_captions_make_room_and_long_ones_end_in_an_ellipsis(tmp_path: Path) -> None:
    lines = grids.wrapped("a picture " * 40, grids.CAPTION, 256, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and lines[0].startswith("a picture")
    assert all(grids._length(line, grids.CAPTION) <= 256 for line in lines)
    assert grids.wrapped("w" * 300, grids.CAPTION, 256, 2)[0].endswith("w…")
    assert grids.wrapped("two words", grids.CAPTION, 256, 3) == ["two words"] and grids.wrapped("", 17, 256, 3) == []
    path = tmp_path / "grid.png"
    red = Image.new("RGB", (8, 8), "red")
    grids.grid([[red], [red]], ["", ""], [""], path, [["a picture " * 40], ["short"]])
    image = pixels(path)
    assert image.shape[0] == 2 * 24 + 2 * (256 + 12) + (3 + 1) * 22
    assert (image[36 + 256 : 36 + 256 + 66] < 140).any(axis=(1, 2)).sum() > 20  # ink below the first picture


def test_models_stand_beside_the_condition(tmp_path: Path) -> None:
    config = FiguresConfig(
        output=tmp_path, pictures=picture_folder(tmp_path), rows=("Single", "Joint"), against="IPAdapter+", examples=1
    )
    run(config)
    tasks, against = pixels(tmp_path / "tasks.png"), pixels(tmp_path / "against.png")
    assert tasks.shape[1] < against.shape[1]
    for row in range(5):
        shades = {name: np.array(colour) + 2 * (2 * row) for name, colour in PALETTE.items()}
        for image, columns in ((tasks, ["Single", "Joint"]), (against, ["IPAdapter+", "Single", "Joint"])):
            assert cell(image, row, 0).tolist() == list(CONDITION)
            for column, name in enumerate(columns, start=1):
                assert abs(cell(image, row, column) - shades[name]).max() <= 3  # JPEG
    assert not list(tmp_path.glob("rewordings*"))  # nothing was reworded


def test_examples_that_all_rows_have_go_first_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    lines = (folder / INDEX).read_text().splitlines()
    gone = ('"Single", "task": "face", "index": 0', '"Single", "task": "style"')
    (folder / INDEX).write_text("".join(f"{line}\n" for line in lines if not any(part in line for part in gone)))
    path = tmp_path / "grid.png"
    grids.models_grid(folder, read_index(folder), ["Joint", "Single"], [Task.STYLE, Task.FACE], 1, path)
    image = pixels(path)
    assert cell(image, 0, 2).tolist() == [255, 255, 255] and abs(cell(image, 0, 1) - (204, 34, 44)).max() <= 3
    assert abs(cell(image, 1, 1) - (218, 48, 58)).max() <= 3 and abs(cell(image, 1, 2) - (48, 178, 78)).max() <= 3


def test_rewordings_of_one_condition_stand_side_by_side(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    for number in range(3):
        add(folder, Picture("Joint", Task.STYLE, 10 + number, "style-0.png", "a cat 0", f"way {number}"), 10 + number)
    run(FiguresConfig(output=tmp_path, pictures=folder, rows=("Single", "Joint"), wordings=3))
    assert [path.name for path in tmp_path.glob("rewordings*")] == ["rewordings-1.png"]
    image = pixels(tmp_path / "rewordings-1.png")
    assert image.shape[0] == 2 * 24 + 29 + 256 + 12 + 22  # one condition only
    expected = [np.array(CONDITION), *(np.array(PALETTE["Joint"]) + 2 * shade for shade in (2, 10, 11))]
    for column, colour in enumerate(expected):
        assert abs(cell(image, 0, column) - colour).max() <= 3
    assert image.shape[1] == 2 * 24 + 232 + 4 * 256 + 3 * 12  # the fourth wording is left out


def test_the_index_keeps_what_was_written_and_the_last_of_two(tmp_path: Path) -> None:
    first = Picture("IPAdapter+", Task.FACE, 7, "/elsewhere/a.jpg", "ein Bär", "use the face")
    again = Picture("IPAdapter+", Task.FACE, 7, "/elsewhere/a.jpg", "ein Bär", "the face, please")
    other = Picture("IPAdapter+", Task.STYLE, 7, "b.jpg", "a\nb", "")
    for picture in (first, other, again):
        write_index_line(tmp_path, picture)
    assert read_index(tmp_path) == [again, other]
    assert first.name == "IPAdapter+/face/00007.jpg"


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\\b", "a\nb"])
def test_a_row_that_cannot_name_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder; leave out slashes"):
        write_index_line(tmp_path, Picture(name, Task.FACE, 0, "a.jpg", "", ""))
    assert not (tmp_path / INDEX).exists()


def test_bad_pictures(tmp_path: Path) -> None:
    def config(folder: Path, **settings: object) -> FiguresConfig:
        return FiguresConfig(output=tmp_path / "out", pictures=folder, **settings)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "index.jsonl; make it with `python -m training evaluate`" in refusal(config(empty))
    (empty / INDEX).write_text("")
    assert "names no picture; make some with" in refusal(config(empty))
    (empty / INDEX).write_text('{"row": "Joint", "task": "hat"}\n')
    assert "is not an index of pictures" in refusal(config(empty))
    folder = picture_folder(tmp_path)
    message = refusal(config(folder, rows=("Jiont",)))
    assert message == 'The index has no row "Jiont"; its rows are Joint, Single, IPAdapter+.'
    assert 'no row "IPAdapter"' in refusal(config(folder, against="IPAdapter"))
    damaged = folder / "Joint" / "style" / "00000.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert "00000.jpg of the index cannot be read" in refusal(config(folder))
    damaged.unlink()
    assert "00000.jpg of the index cannot be read" in refusal(config(folder))


def test_line_separators_within_a_prompt_stay_in_the_index(tmp_path: Path) -> None:
    pictures = [
        Picture("row", Task.FACE, number, "a.jpg", f"a cat{sign}on a mat", "use the face")
        for number, sign in enumerate(("\u2028", "\x85", "\x0c", "\r", "\n"))
    ]
    for picture in pictures:
        write_index_line(tmp_path, picture)
    assert read_index(tmp_path) == pictures
