"""SD3 and SD3.5: masks act where they were drawn, of any shape, on any picture."""

from __future__ import annotations

import pytest
import torch
from bench import Sd3Bench, assert_differs, assert_same, random


@pytest.fixture
def bench(flow_bench: Sd3Bench) -> Sd3Bench:
    return flow_bench


@pytest.mark.parametrize(
    ("size", "mask_shape"), [((8, 8), (64, 64)), ((8, 24), (1, 1)), ((9, 7), (3, 500)), ((17, 20), (700, 20))]
)
def test_masks_of_any_shape_on_any_picture(bench: Sd3Bench, size: tuple, mask_shape: tuple) -> None:
    x = random(1, 16, *size)
    white, black = (bench.application(mask=value * torch.ones(1, *mask_shape)) for value in (1.0, 0.0))
    assert_same(bench.cfg(bench.apply(white), x=x), bench.cfg(bench.apply(bench.application()), x=x))
    assert torch.equal(bench.cfg(bench.apply(black), x=x), bench.cfg(bench.model, x=x))


def test_a_mask_lies_where_it_was_drawn(bench: Sd3Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to each position: to the picture's in a right half, to the text's half as strongly, if at all."""
    mask, seen = torch.zeros(1, 64, 128), []
    mask[..., 64:] = 1.0
    original = torch.addcmul

    def watched(out: torch.Tensor, addition: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        if gain.shape[-1] == 1:  # the host's own uses are of whole width
            seen.append(addition * gain)
        return original(out, addition, gain)

    monkeypatch.setattr(torch, "addcmul", watched)
    x = random(1, 16, 8, 16)
    added = []
    for each in (bench.application(mask=mask), bench.application()):
        seen.clear()
        bench.cfg(bench.apply(each), x=x)
        added.append(seen[0])  # of the first block, where the attention is the same in both
    masked, whole = added
    text = masked.shape[1] - 4 * 8
    left, right = (part.unflatten(1, (4, 8)) for part in (masked[:, text:], whole[:, text:]))
    assert not left[:, :, :4].any()
    assert_same(left[:, :, 4:], right[:, :, 4:])
    assert torch.any(whole[:, :text]) != bench.normed
    torch.testing.assert_close(masked[:, :text], 0.5 * whole[:, :text], rtol=1e-4, atol=1e-5)


def test_mask_batch_goes_with_the_latents(bench: Sd3Bench) -> None:
    masks = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])
    x = random(1, 16, 8, 8).repeat(2, 1, 1, 1)
    ours = bench.cfg(bench.apply(bench.application(mask=masks)), x=x)
    assert_same(ours[:1], bench.cfg(bench.apply(bench.application()), x=x)[:1], 1e-4)
    assert_same(ours[1:], bench.cfg(bench.model, x=x)[1:], 1e-4)


def test_a_mask_meets_an_area(bench: Sd3Bench) -> None:
    """The positive acts in the right half alone: there the mask's right half is all that counts."""
    x, mask = random(1, 16, 8, 16), torch.zeros(1, 64, 128)
    mask[..., 64:] = 1.0
    area = [[bench.positive[0][0], bench.positive[0][1] | {"area": (8, 8, 0, 8)}], *bench.positive]
    ours = bench.cfg(bench.apply(bench.application(mask=mask)), x=x, positive=area)
    assert torch.isfinite(ours).all()
    assert_differs(ours, bench.cfg(bench.model, x=x, positive=area))
