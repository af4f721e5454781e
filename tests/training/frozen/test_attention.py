"""Which kernel attention runs with: short sequences in half as many bits on a processor take plain products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_base import NoAdapter, save_sd15
from training.frozen.base import load_base
from training.frozen.network import prepare
from training.train.adapter import losses


@pytest.mark.parametrize(
    ("side", "dtype", "fused"),
    [(8, torch.bfloat16, False), (16, torch.bfloat16, False), (32, torch.bfloat16, True), (8, torch.float32, True)],
)
def test_short_sequences_are_attended_without_the_fused_kernel(
    side: int, dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    base = load_base(save_sd15(tmp_path / "base"))
    prepare(base.network)
    noise = torch.Generator().manual_seed(1)
    batch = {
        "latents": torch.randn(2, 4, side, side, generator=noise),
        "noise": torch.randn(2, 4, side, side, generator=noise),
        "timestep": torch.tensor([100, 900]),
        "text": base.text_states(base.tokens(["a fox", ""])).hidden,
        **dict.fromkeys(("image", "instruction", "prompt"), torch.zeros(2, 1, 1)),
    }
    exact = losses(base.network, NoAdapter(), base.schedule, batch, torch.float32)
    seen: list[bool] = []
    base.network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    found = losses(base.network.to(dtype), NoAdapter(), base.schedule, batch, dtype)
    assert seen == [fused] and torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
