"""References as things of their own: what the model makes of them, in numbers, beside plain applications."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import inside
import pytest
import torch
from bench import CFG, Application, Bench, Row, assert_differs, assert_same, random, simple_guidance, tokens

core = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.reference")
curves = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.curves")
tasks = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.tasks")
ApplyAdapter = importlib.import_module(f"{inside.PACK}.nodes.apply").ApplyAdapter
STRENGTH = 0.8  # of the task style on SD1.5
Curve = curves.Curve


def reference(bench: Bench, seed: int, count: int = 1, task: Any = tasks.Task.STYLE) -> Any:
    drawn = tokens(seed, count)
    return core.EncodedReference(drawn, task, "use the style", 1, bench.adapter.name, bench.adapter.sha256)


def applied(bench: Bench, which: Any, **settings: Any) -> Any:
    return ApplyAdapter.execute(bench.model, bench.adapter, reference=which, **settings)[0]


def plain(bench: Bench, rows: dict[Any, torch.Tensor], **settings: Any) -> Any:
    return Application(**({"adapter": bench.adapter, "tokens": rows, "weight": STRENGTH} | settings))


def test_a_reference_is_applied_as_its_tokens_are(bench: Bench) -> None:
    which = reference(bench, 1)
    torch.testing.assert_close(
        bench.cfg(applied(bench, which)), bench.cfg(bench.apply(plain(bench, which.tokens))), rtol=0, atol=0
    )


@pytest.mark.parametrize("guidance", ["simple", "three-way"])
def test_shares_are_as_many_copies(bench: Bench, guidance: str) -> None:
    """A reference with three times the weight is as if its tokens were there three times."""
    one, other = reference(bench, 1), reference(bench, 2)
    whole = core.combine([one, other], [1.0, 3.0], mean=False)
    rows = {row: torch.cat([one.tokens[row], *[other.tokens[row]] * 3], dim=1) for row in Row}
    scales = None if guidance == "simple" else bench_scales()
    copies = bench.apply(plain(bench, rows, three_way=scales))
    found = bench.cfg(applied(bench, whole, guidance=guidance, instruct_scale=3.0, image_scale=0.5))
    assert_same(found, bench.cfg(copies), 1e-4)
    assert_differs(found, bench.cfg(applied(bench, core.combine([one, other], [1.0, 1.0], mean=False))))


def bench_scales() -> Any:
    return importlib.import_module(f"{inside.PACK}.nodes.host.application").ThreeWay(3.0, 0.5)


def test_pictures_for_each_latent_keep_their_shares(bench: Bench) -> None:
    each, shared, x = reference(bench, 1, count=2), reference(bench, 2), random(2, 4, 8, 8)
    whole = core.combine([each, shared], [1.0, 2.0], mean=False)
    found = bench.cfg(applied(bench, whole), x=x)
    for place in range(2):
        rows = {row: each.tokens[row][place : place + 1] for row in Row}
        alone = core.combine([replace(each, tokens=rows), shared], [1.0, 2.0], mean=False)
        assert_same(found[place], bench.cfg(applied(bench, alone), x=x[place : place + 1])[0], 1e-4)


def test_a_negative_stands_for_no_picture_in_simple_guidance(bench: Bench) -> None:
    which, away = reference(bench, 1), reference(bench, 2)
    rows = which.tokens | {Row.UNCOND: away.tokens[Row.FULL]}
    found = bench.cfg(applied(bench, which, negative_reference=away))
    assert_same(found, simple_guidance(bench, plain(bench, rows), CFG))
    assert_differs(found, bench.cfg(applied(bench, which)))


def test_a_negative_stands_for_no_picture_in_three_way_guidance(bench: Bench) -> None:
    which, away = reference(bench, 1), core.combine([reference(bench, 2), reference(bench, 3)], [1.0, 2.0], mean=False)
    settings = {"guidance": "three-way", "instruct_scale": 3.0, "image_scale": 0.5}
    rows = {row: each.repeat(1, 2, 1) for row, each in which.tokens.items()}
    two, three = (reference(bench, seed).tokens[Row.FULL] for seed in (2, 3))
    rows = {row: each.repeat(1, 3, 1) for row, each in which.tokens.items()}
    rows[Row.UNCOND] = torch.cat([two, three, three], dim=1)
    found = bench.cfg(applied(bench, which, negative_reference=away, **settings))
    assert_same(found, bench.three_way(plain(bench, rows), CFG, bench_scales()), 1e-4)


def test_a_negative_of_nothing_is_none(bench: Bench) -> None:
    which = reference(bench, 1)
    nothing = replace(which, tokens=dict.fromkeys(Row, which.tokens[Row.UNCOND]))
    torch.testing.assert_close(
        bench.cfg(applied(bench, which, negative_reference=nothing)),
        bench.cfg(applied(bench, which)),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("curve", [curve for curve in Curve if curve is not Curve.CONSTANT])
@pytest.mark.parametrize("progress", [0.02, 0.3, 0.5, 0.85])
def test_a_curve_is_a_weight_at_each_step(bench: Bench, curve: Any, progress: float) -> None:
    which, (start, end) = reference(bench, 1), (0.2, 0.8)
    sigma = bench.model.get_model_object("model_sampling").percent_to_sigma(start + (end - start) * progress)
    smooth = {"ease in": progress, "ease out": 1 - progress, "ease in-out": 1 - abs(2 * progress - 1)}
    smooth["ease out-in"] = 1 - smooth["ease in-out"]
    factor = smooth[curve.value] ** 2 * (3 - 2 * smooth[curve.value])
    found = bench.cfg(
        applied(bench, which, weight_curve=curve.value, start_percent=start, end_percent=end), sigma=float(sigma)
    )
    expected = bench.cfg(bench.apply(plain(bench, which.tokens, weight=STRENGTH * factor)), sigma=float(sigma))
    assert_same(found, expected, 1e-3)
    if factor > 0.05:
        assert_differs(found, bench.cfg(bench.model, sigma=float(sigma)))


def test_two_curves_and_a_mask_keep_apart(bench: Bench) -> None:
    one, other = reference(bench, 1), reference(bench, 2)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1.0
    sigma = float(bench.model.get_model_object("model_sampling").percent_to_sigma(0.25))
    rising, smooth = 0.25, lambda p: p * p * (3 - 2 * p)
    model = applied(bench, one, weight_curve="ease in", mask=mask)
    both = ApplyAdapter.execute(model, bench.adapter, reference=other, weight_curve="ease out")[0]
    expected = bench.apply(
        plain(bench, one.tokens, weight=STRENGTH * smooth(rising), mask=mask),
        plain(bench, other.tokens, weight=STRENGTH * (1 - smooth(rising))),
    )
    assert_same(bench.cfg(both, sigma=sigma), bench.cfg(expected, sigma=sigma), 1e-3)


def test_another_adapters_reference_is_refused_by_name(bench: Bench) -> None:
    foreign = replace(reference(bench, 1), adapter="other.bin", adapter_sha256="other")
    for inputs in ({"reference": foreign}, {"reference": reference(bench, 1), "negative_reference": foreign}):
        with pytest.raises(ValueError, match=f"adapter other.bin, whose weights are not those of {bench.adapter.name}"):
            ApplyAdapter.execute(bench.model, bench.adapter, **inputs)


def test_both_or_neither_is_told(bench: Bench) -> None:
    with pytest.raises(ValueError, match="Both a reference and image are connected"):
        ApplyAdapter.execute(bench.model, bench.adapter, image=torch.zeros(1, 8, 8, 3), reference=reference(bench, 1))
    with pytest.raises(ValueError, match="no picture to apply: instruction and clip_vision and image not connected"):
        ApplyAdapter.execute(bench.model, bench.adapter)
