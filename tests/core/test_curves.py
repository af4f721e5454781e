"""Curves of the weight: their ends and middles, and the table that is looked up where the noise level is."""

from __future__ import annotations

import pytest
import torch
from ipadapter_instruct_core.curves import Curve, CurveTable

ENDS = {
    Curve.CONSTANT: (1, 1, 1),
    Curve.EASE_IN: (0, 0.5, 1),
    Curve.EASE_OUT: (1, 0.5, 0),
    Curve.EASE_IN_OUT: (0, 1, 0),
    Curve.EASE_OUT_IN: (1, 0, 1),
}
QUARTER = 3 * 0.25**2 - 2 * 0.25**3


@pytest.mark.parametrize("curve", Curve)
def test_ends_and_middle(curve: Curve) -> None:
    assert tuple(curve.factor(p) for p in (0.0, 0.5, 1.0)) == pytest.approx(ENDS[curve])


def test_it_is_smooth_between() -> None:
    assert Curve.EASE_IN.factor(0.25) == pytest.approx(QUARTER)
    assert Curve.EASE_OUT.factor(0.25) == pytest.approx(1 - QUARTER)
    assert Curve.EASE_IN_OUT.factor(0.125) == pytest.approx(QUARTER)


def test_the_table_draws_straight_lines_and_holds_its_ends() -> None:
    table = CurveTable.of([(0.1, 1.0), (0.5, 0.2), (4.0, 0.6)])
    for sigma, factor in ((0.0, 1.0), (0.1, 1.0), (0.3, 0.6), (0.5, 0.2), (2.25, 0.4), (4.0, 0.6), (99.0, 0.6)):
        found = table.factor(torch.tensor([sigma, 50.0]))
        assert found.shape == (1,)
        assert float(found) == pytest.approx(factor, abs=1e-6)
