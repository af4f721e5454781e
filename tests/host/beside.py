"""What three-way guidance must give beside a patch of another pack's, from plain predictions and simple guidance.

What a patch does to the sampler's own rows is told by simple guidance at two scales; the rows that three-way adds are
plain predictions with their own tokens, which no such patch has touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench import CFG, Bench, Row, ThreeWay, application, assert_differs, assert_same, guidance

SCALES = [ThreeWay(2.0, 1.5), ThreeWay(2.0, 1.0)]  # of four rows, and of three: the negative counts for nothing
ORDERS = ["before", "after"]
Patch = Callable[[Any], Any]


def in_order(bench: Bench, order: str, patch: Patch, *each: Any) -> Any:
    if order == "before":
        return bench.apply(*each, model=patch(bench.model))
    return patch(bench.apply(*each))


def sampled(bench: Bench, model: Any, cfg: float = CFG, **kwargs: Any) -> torch.Tensor:
    return bench.cfg(model, cfg, **kwargs)


def own_rows(bench: Bench, order: str, patch: Patch, each: Any, **kwargs: Any) -> dict[Any, torch.Tensor]:
    """The positive and the negative as the patch leaves them under simple guidance, of two scales."""
    simple = application.replace(each, three_way=None)
    model = in_order(bench, order, patch, simple)
    negative, doubled = (sampled(bench, model, cfg, **kwargs) for cfg in (0.0, 2.0))
    return {Row.FULL: (doubled + negative) / 2, Row.UNCOND: negative}


def three_way(bench: Bench, order: str, patch: Patch, each: Any, cfg: Any = CFG, **kwargs: Any) -> torch.Tensor:
    rows = own_rows(bench, order, patch, each, **kwargs)
    kwargs.pop("positive", None)  # the rows that are added read the negative's text
    rows |= {row: bench.predict(bench.negative, {each: row}, **kwargs) for row in (Row.EVERYTHING, Row.IMAGE)}
    return guidance.three_way(rows, cfg, each.three_way.instruct_scale, each.three_way.image_scale)


def check(bench: Bench, order: str, patch: Patch, scales: Any, **kwargs: Any) -> None:
    each = bench.application(three_way=scales)
    ours = sampled(bench, in_order(bench, order, patch, each), **kwargs)
    assert_same(ours, three_way(bench, order, patch, each, **kwargs), 1e-4)
    kwargs.pop("positive", None)  # where it is the positive that carries the patch
    assert_differs(ours, sampled(bench, bench.apply(each), **kwargs))
