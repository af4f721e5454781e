"""The formulas of guidance agree with one another, whatever the scales and however many rows are there."""

from __future__ import annotations

from random import Random

import pytest
import torch
from ipadapter_instruct_core.guidance import (
    Row,
    simple,
    simple_coefficients,
    three_way,
    three_way_coefficients,
    three_way_correction,
)
from torch import Tensor

_draw = Random(0)
SCALES = [(7.0, 6.0, 0.5), (5.0, 2.0, 1.0), (7.0, 7.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (3.0, 2.0, 3.0)]
SCALES += [(_draw.uniform(0, 30), _draw.uniform(0, 30), _draw.uniform(0, 30)) for _ in range(20)]
ANY_SCALES = pytest.mark.parametrize("text, instruct, image", SCALES)


@pytest.fixture
def rows() -> dict[Row, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {row: torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64) for row in Row}


@ANY_SCALES
def test_three_way_is_the_papers_formula(rows: dict[Row, Tensor], text: float, instruct: float, image: float) -> None:
    full, everything, picture, uncond = (rows[row] for row in (Row.FULL, Row.EVERYTHING, Row.IMAGE, Row.UNCOND))
    nested = uncond + instruct * (full - everything) + text * (everything - picture) + image * (picture - uncond)
    expanded = (1 - image) * uncond + instruct * full + (text - instruct) * everything + (image - text) * picture
    ours = three_way(rows, text_scale=text, instruct_scale=instruct, image_scale=image)
    torch.testing.assert_close(ours, nested)
    torch.testing.assert_close(ours, expanded)
    assert sum(three_way_coefficients(text, instruct, image).values()) == pytest.approx(1.0)


@ANY_SCALES
def test_the_correction_turns_simple_into_three_way(
    rows: dict[Row, Tensor], text: float, instruct: float, image: float
) -> None:
    correction = three_way_correction(rows, text_scale=text, instruct_scale=instruct, image_scale=image)
    expected = three_way(rows, text_scale=text, instruct_scale=instruct, image_scale=image)
    torch.testing.assert_close(simple(rows, text) + correction, expected)


@ANY_SCALES
def test_rows_with_a_zero_factor_may_be_absent(
    rows: dict[Row, Tensor], text: float, instruct: float, image: float
) -> None:
    needed = {row: rows[row] for row, factor in three_way_coefficients(text, instruct, image).items() if factor}
    ours = three_way(needed, text_scale=text, instruct_scale=instruct, image_scale=image)
    assert torch.equal(ours, three_way(rows, text_scale=text, instruct_scale=instruct, image_scale=image))


@pytest.mark.parametrize(
    "scales, needed",
    [
        ((5.0, 5.0, 1.0), {Row.FULL, Row.IMAGE}),
        ((5.0, 2.0, 1.0), {Row.FULL, Row.EVERYTHING, Row.IMAGE}),
        ((7.0, 4.0, 0.5), set(Row)),
        ((7.0, 7.0, 7.0), {Row.FULL, Row.UNCOND}),
    ],
)
def test_how_many_rows_scales_ask_for(scales: tuple[float, float, float], needed: set[Row]) -> None:
    assert {row for row, factor in three_way_coefficients(*scales).items() if factor != 0.0} == needed


def test_simple_is_classifier_free_guidance(rows: dict[Row, Tensor]) -> None:
    full, uncond = rows[Row.FULL], rows[Row.UNCOND]
    torch.testing.assert_close(simple(rows, 7.5), uncond + 7.5 * (full - uncond))
    assert simple_coefficients(1.0) == {Row.FULL: 1.0, Row.UNCOND: 0.0}
    assert torch.equal(simple({Row.FULL: full}, 1.0), full)


def test_equal_scales_need_no_correction() -> None:
    assert three_way_correction({}, text_scale=4.0, instruct_scale=4.0, image_scale=4.0) == 0.0
