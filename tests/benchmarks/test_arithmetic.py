"""What SD3's adapter costs at SD3 medium's real size: what its form asks for, and nothing above it."""

from __future__ import annotations

import pytest

from benchmarks import arithmetic, host


@pytest.mark.parametrize(("side", "more"), [(512, 0.15), (1024, 0.24)])
def test_a_call_takes_what_the_form_asks_for(side: int, more: float) -> None:
    """By the published form, 15 and 24 % more than the bare call, of which the host's attention is counted whole."""
    host.start()
    network = arithmetic.transformer()
    bare = arithmetic.counted(network, side, adapted=False)
    extra = arithmetic.counted(network, side, adapted=True) - bare
    assert extra / bare == pytest.approx(more, abs=0.01)
    assert extra == arithmetic.reckoned(side)
