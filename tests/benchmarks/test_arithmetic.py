"""What SD3's and SD3.5's adapters cost at the mediums' real size: what their form asks for, and nothing above it."""

from __future__ import annotations

import pytest

from benchmarks import arithmetic, host


@pytest.mark.parametrize(
    ("name", "side", "more"),
    [("SD3 medium", 512, 0.15), ("SD3 medium", 1024, 0.24), ("SD3.5 medium", 512, 0.0), ("SD3.5 medium", 1024, 0.0)],
)
def test_a_call_takes_what_the_form_asks_for(name: str, side: int, more: float) -> None:
    """By SD3's published form, 15 and 24 % more than the bare call, of which the host's attention is counted whole; by
    the plain one next to nothing."""
    host.start()
    network = arithmetic.transformer(name)
    bare = arithmetic.counted(network, side, adapted=False)
    extra = arithmetic.counted(network, side, adapted=True) - bare
    assert extra / bare == pytest.approx(more, abs=0.01)
    assert extra == arithmetic.reckoned(name, side) > 0
