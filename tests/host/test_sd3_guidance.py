"""SD3 and SD3.5: the same rows, guidance and ranges as on UNets, and several pictures, on the host's own transformer.

Expectations are spelled out of separate plain predictions, as in test_guidance.py.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.samplers
import pytest
import torch
from bench import (
    Row,
    Sd3Bench,
    ThreeWay,
    assert_differs,
    assert_same,
    counted_rows,
    guidance,
    random,
    simple_guidance,
    tokens,
)

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)
CFG = 6.0


@pytest.fixture
def bench(flow_bench: Sd3Bench) -> Sd3Bench:
    return flow_bench


def rows_of(bench: Sd3Bench, *applied: dict[Any, Any], **kwargs: Any) -> dict[Any, torch.Tensor]:
    """The four rows, with what each application shows in each; all but the last with the positive's pooled vector."""
    pooled = [[bench.negative[0][0], bench.positive[0][1]]]
    texts = dict(zip(Row, (bench.positive, pooled, pooled, bench.negative), strict=True))
    shown = [{row: {each: rows.get(row, row) for each, rows in zip(*applied, strict=True)} for row in Row}]
    return {row: bench.predict(texts[row], shown[0][row], **kwargs) for row in Row}


def three_way(bench: Sd3Bench, each: Any, cfg: float, scales: Any, **kwargs: Any) -> torch.Tensor:
    rows = rows_of(bench, [each], [{}], **kwargs)
    return guidance.three_way(rows, cfg, scales.instruct_scale, scales.image_scale)


@pytest.mark.parametrize("cfg", [6.0, 1.0, 0.0])
def test_simple_guidance(bench: Sd3Bench, cfg: float) -> None:
    each = bench.application()
    ours = bench.cfg(bench.apply(each), cfg)
    assert_same(ours, simple_guidance(bench, each, cfg))
    assert_differs(ours, bench.cfg(bench.model, cfg), 1e-2)


@pytest.mark.parametrize("cfg", [6.0, 1.0, 0.0])
def test_three_way_guidance(bench: Sd3Bench, cfg: float) -> None:
    each = bench.application(three_way=SCALES)
    assert_same(bench.cfg(bench.apply(each), cfg), three_way(bench, each, cfg, SCALES), 1e-4)


@pytest.mark.parametrize(("scales", "rows"), [(ThreeWay(6.0, 1.0), 2), (ThreeWay(2.0, 1.0), 3), (SCALES, 4)])
def test_rows_that_count_for_nothing_cost_nothing(bench: Sd3Bench, scales: Any, rows: int) -> None:
    """The reference settings, text and instruction 6 and image 1, take two: 6 full - 5 image."""
    each = bench.application(three_way=scales)
    model, counts = counted_rows(bench.apply(each))
    ours = bench.cfg(model, CFG)
    assert sum(counts) == rows
    assert_same(ours, three_way(bench, each, CFG, scales), 1e-4)


@pytest.mark.parametrize("scales", [ThreeWay(6.0, 1.0), SCALES])
def test_skip_layer_guidance_of_the_negative_alone(bench: Sd3Bench, scales: Any) -> None:
    """The host's simple node evaluates the two prompts in a call each; three-way guidance goes on beside it."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    each = bench.application(three_way=scales)
    model = SkipLayerGuidanceDiTSimple.execute(bench.apply(each), 0.0, 1.0, double_layers="2", single_layers="").args[0]
    skipped = bench.apply(bench.application())
    skipped.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 2)
    rows = rows_of(bench, [each], [{}]) | {Row.UNCOND: bench.cfg(skipped, 0.0)}
    expected = guidance.three_way(rows, CFG, scales.instruct_scale, scales.image_scale)
    assert_same(bench.cfg(model, CFG), expected, 1e-4)


@pytest.mark.parametrize("scales", [None, SCALES])
def test_rows_one_at_a_time(bench: Sd3Bench, monkeypatch: pytest.MonkeyPatch, scales: Any) -> None:
    """As the host does when it is short of memory."""
    model = bench.apply(bench.application(three_way=scales))
    expected = bench.cfg(model, CFG)
    monkeypatch.setattr(bench.model.model, "memory_required", lambda *args, **kwargs: 1e15)
    model, counts = counted_rows(model)
    assert_same(bench.cfg(model, CFG), expected)
    assert set(counts) == {1} and len(counts) == (2 if scales is None else 4)


def test_a_chain_adds_to_the_same_attention(bench: Sd3Bench) -> None:
    """Order does not matter; a second one that repeats the first doubles it."""
    first, second = bench.application(1, weight=0.4), bench.application(2, three_way=SCALES)
    ours = bench.cfg(bench.apply(first, second), CFG)
    assert_same(bench.cfg(bench.apply(second, first), CFG), ours, 1e-4)
    rows = rows_of(bench, [first, second], [{Row.EVERYTHING: Row.FULL, Row.IMAGE: Row.UNCOND}, {}])
    assert_same(ours, guidance.three_way(rows, CFG, 2.0, 1.5), 1e-4)
    twice = bench.cfg(bench.apply(first, first), CFG)
    assert_same(twice, bench.cfg(bench.apply(bench.application(1, weight=0.8)), CFG), 1e-4)


def test_weight_zero_is_the_bare_model_bit_for_bit(bench: Sd3Bench) -> None:
    assert torch.equal(bench.cfg(bench.apply(bench.application(weight=0.0))), bench.cfg(bench.model))


def test_range(bench: Sd3Bench) -> None:
    late = bench.application(start_percent=0.5, three_way=SCALES)
    sampling = bench.model.get_model_object("model_sampling")
    for percent, acts in ((0.3, False), (0.7, True)):
        sigma = float(sampling.percent_to_sigma(percent))
        expected = bench.apply(bench.application(three_way=SCALES)) if acts else bench.model
        assert torch.equal(bench.cfg(bench.apply(late), sigma=sigma), bench.cfg(expected, sigma=sigma))


# Several pictures.


def test_several_equal_pictures_are_one(bench: Sd3Bench) -> None:
    one = bench.application()
    three = bench.application(tokens={row: t.repeat(1, 3, 1) for row, t in one.tokens.items()})
    assert_same(bench.cfg(bench.apply(three)), bench.cfg(bench.apply(one)))
    second = tokens(5, width=4096)
    other = bench.application(tokens={row: torch.cat([t, second[row]], dim=1) for row, t in one.tokens.items()})
    assert_differs(bench.cfg(bench.apply(other)), bench.cfg(bench.apply(one)))


def test_one_picture_for_each_latent(bench: Sd3Bench) -> None:
    x = random(2, 16, 8, 8)
    both = bench.application(tokens=tokens(1, count=2, width=4096))
    ours = bench.cfg(bench.apply(both), x=x)
    for i in range(2):
        alone = bench.application(tokens={row: t[i : i + 1] for row, t in both.tokens.items()})
        assert_same(ours[i : i + 1], bench.cfg(bench.apply(alone), x=x[i : i + 1]), 1e-4)


@pytest.mark.parametrize("shift", [1.32, 3.0])
def test_a_range_from_the_start_holds_the_first_step(bench: Sd3Bench, shift: float) -> None:
    """Rounded, the first noise level of a sampler lies above the model's highest at some shifts."""
    model = bench.model.clone()
    levels = copy.deepcopy(model.get_model_object("model_sampling"))
    levels.set_parameters(shift=shift, multiplier=1000)
    model.add_object_patch("model_sampling", levels)
    first = float(comfy.samplers.calculate_sigmas(levels, "simple", 20)[0])
    assert (first > 1.0) == (shift == 1.32)
    ours = [bench.cfg(bench.apply(bench.application(end_percent=end), model=model), sigma=first) for end in (0.8, 1.0)]
    assert_same(*ours)
    assert_differs(ours[0], bench.cfg(model, sigma=first))
