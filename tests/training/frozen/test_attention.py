"""Which kernel attention runs with: short sequences in half as many bits on a processor take plain products."""

from __future__ import annotations

import pytest
import torch
from training.frozen.attention import quick_gradients


@pytest.mark.parametrize(
    ("side", "dtype", "fused"),
    [(8, torch.bfloat16, False), (16, torch.float16, False), (32, torch.bfloat16, True), (8, torch.float32, True)],
)
def test_short_sequences_are_attended_without_the_fused_kernel(side: int, dtype: torch.dtype, fused: bool) -> None:
    with quick_gradients(torch.zeros(2, 4, side, side), dtype):
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert torch.backends.cuda.flash_sdp_enabled()
