"""Which square of a picture is taken, on pictures whose pixels tell where they come from."""

from __future__ import annotations

import random

import pytest
import torch
from ipadapter_instruct_core.encoders import preprocess
from ipadapter_instruct_core.framing import PLACES, box_around, colour_of, framed
from torch import Tensor

RED = torch.tensor([1.0, 0.0, 0.0])


def ramp(height: int, width: int) -> Tensor:
    """Red tells the row, green the column."""
    rows = torch.linspace(0, 1, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(0, 1, width).view(1, -1).expand(height, width)
    return torch.stack([rows, columns, torch.zeros(height, width)])


def whole(image: Tensor) -> tuple[int, int, int, int]:
    return (0, 0, *image.shape[1:])


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 300), (40, 90), (64, 64), (225, 224), (9, 200)])
def test_the_middle_is_what_the_tower_itself_would_take(height: int, width: int) -> None:
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    found = framed(image, whole(image), "center", RED, 64)
    expected = preprocess(image.unsqueeze(0), 64, (0, 0, 0), (1, 1, 1))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(preprocess(found.unsqueeze(0), 64, (0, 0, 0), (1, 1, 1))[0], found, rtol=0, atol=0)


def test_places_lie_where_they_say() -> None:
    tall, wide = ramp(300, 100), ramp(100, 300)
    rows = {place: framed(tall, whole(tall), place, RED, 50)[0].mean() for place in PLACES}
    columns = {place: framed(wide, whole(wide), place, RED, 50)[1].mean() for place in PLACES}
    expected = {"center": 1 / 2, "top": 1 / 6, "bottom": 5 / 6, "left": 1 / 2, "right": 1 / 2}
    for place, share in expected.items():
        assert rows[place] == pytest.approx(share, abs=0.01)
    for place, share in {"left": 1 / 6, "right": 5 / 6, "top": 1 / 2, "center": 1 / 2}.items():
        assert columns[place] == pytest.approx(share, abs=0.01)


def test_padding_keeps_all_of_the_picture() -> None:
    wide = ramp(100, 300)
    found = framed(wide, whole(wide), "pad", RED, 60)
    assert torch.equal(found[:, :20], RED.view(3, 1, 1).expand(3, 20, 60))
    assert torch.equal(found[:, 40:], RED.view(3, 1, 1).expand(3, 20, 60))
    assert found[1, 30, 0] < 0.02 and found[1, 30, -1] > 0.98


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_odd_pictures_give_a_square(height: int, width: int, place: str) -> None:
    image = torch.full((3, height, width), 0.25)
    found = framed(image, whole(image), place, RED, 224)
    assert found.shape == (3, 224, 224) and torch.isfinite(found).all()
    assert ((found - 0.25).abs() < 0.01).all(dim=0).any(), "something of the picture is seen"


def test_a_box_lies_around_the_mask_and_in_the_picture() -> None:
    mask = torch.zeros(100, 200)
    mask[40:60, 90:100] = 1.0
    assert box_around(mask, 0.0, whole=False) == (40, 85, 20, 20)
    assert box_around(mask, 0.5, whole=False) == (35, 80, 30, 30)
    assert box_around(mask, 0.5, whole=True) == (35, 85, 30, 20)
    mask = torch.zeros(100, 200)
    mask[:20, :10] = 1.0
    assert box_around(mask, 0.5, whole=False) == (0, 0, 30, 30)
    assert box_around(mask, 40.0, whole=False) == (0, 0, 100, 100)
    full = torch.ones(100, 200)
    assert box_around(full, 0.5, whole=True) == (0, 0, 100, 200)
    assert box_around(full, 0.5, whole=False) == (0, 50, 100, 100)
    soft = torch.zeros(100, 200)
    soft[40:60, 90:100] = 0.3
    assert box_around(soft, 0.0, whole=False) == (40, 85, 20, 20), "the brightest part, however bright"
    with pytest.raises(ValueError, match="black everywhere"):
        box_around(torch.zeros(10, 10), 0.5, whole=False)


def test_colours_by_name_value_and_lot() -> None:
    lot = random.Random(1)
    assert colour_of("teal", lot) == (0, 128, 128)
    assert colour_of(" #7fb0c8 ", lot) == (0x7F, 0xB0, 0xC8)
    drawn = [colour_of("random", lot) for _ in range(8)]
    assert len(set(drawn)) == 8 and drawn[0] == colour_of("Random", random.Random(1))
    for words in ("teel", "", "#12", "rgb(", "x" * 1000):
        with pytest.raises(ValueError, match="is no colour"):
            colour_of(words, lot)
