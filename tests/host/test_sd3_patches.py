"""SD3 and SD3.5 beside other patches of a MODEL, on clones and on re-runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench import Row, Sd3Bench, ThreeWay, assert_differs, assert_same

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)


@pytest.fixture
def bench(flow_bench: Sd3Bench) -> Sd3Bench:
    return flow_bench


def replacements(model: Any) -> dict:
    return model.model_options["transformer_options"]["patches_replace"]["dit"]


def test_rerun_and_clones_change_nothing(bench: Sd3Bench) -> None:
    bare = bench.cfg(bench.model)
    one = bench.apply(bench.application(1))
    after_one = bench.cfg(one)
    two = bench.apply(bench.application(2, three_way=SCALES), model=one)
    after_two = bench.cfg(two)
    for _ in range(2):
        assert torch.equal(bench.cfg(bench.apply(bench.application(2, three_way=SCALES), model=one)), after_two)
        assert torch.equal(bench.cfg(two.clone().clone()), after_two)
        assert torch.equal(bench.cfg(one), after_one)
    assert torch.equal(bench.cfg(bench.model), bare)
    assert all(slot.places == (0, 1) and slot.previous is None for slot in replacements(two).values())
    assert list(replacements(two)) == [("double_block", 0), ("double_block", 2)]


def test_another_replacement_before_ours(bench: Sd3Bench) -> None:
    """It is called, with its change of the block kept, and adds up with ours."""
    calls = []

    def theirs(args: dict, extra_args: dict) -> dict:
        calls.append(1)
        out = extra_args["original_block"](args)
        return out | {"img": out["img"] * 1.1}

    model = bench.model.clone()
    model.set_model_patch_replace(theirs, "dit", "double_block", 0)
    alone = bench.cfg(model)
    calls.clear()
    both = bench.cfg(bench.apply(bench.application(), model=model))
    assert len(calls) == 1
    for other in (alone, bench.cfg(bench.apply(bench.application()))):
        assert_differs(both, other)
    assert torch.equal(bench.cfg(bench.apply(bench.application(weight=0.0), model=model)), alone)


def test_another_replacement_after_ours_that_calls_it(bench: Sd3Bench) -> None:
    model = bench.apply(bench.application()).clone()
    inner = replacements(model)["double_block", 0]
    model.set_model_patch_replace(lambda args, extra: inner(args, extra), "dit", "double_block", 0)
    assert torch.equal(bench.cfg(model), bench.cfg(bench.apply(bench.application())))


def test_a_pack_that_computes_the_attention_itself_is_named(bench: Sd3Bench, caplog: pytest.LogCaptureFixture) -> None:
    block = bench.model.model.diffusion_model.joint_blocks[0]

    def theirs(args: dict, extra_args: dict) -> dict:
        text, image = block(args["txt"], args["img"], c=args["vec"])
        return {"txt": text, "img": image}

    model = bench.model.clone()
    model.set_model_patch_replace(theirs, "dit", "double_block", 0)
    found = bench.denoised(bench.cfg_guider(bench.apply(bench.application(), model=model)), calls=3)
    assert torch.isfinite(found).all()
    assert caplog.text.count("computes this model's attention by itself") == 1


def test_another_attention_override_stays_in_charge(bench: Sd3Bench) -> None:
    """Asked in every block, ours included, and its result is what ours adds to."""
    calls = []

    def override(func: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(q.shape[1])
        return func(q, k, v, *args, **kwargs)

    model = bench.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert_same(bench.cfg(bench.apply(bench.application(), model=model)), bench.cfg(bench.apply(bench.application())))
    assert len(calls) == (8 if bench.normed else 4)


def test_skip_layer_guidance(bench: Sd3Bench) -> None:
    """The host's node evaluates the positive once more without a block of ours, and what it adds stays the same."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    each = bench.application()
    model = bench.apply(each)
    skipped = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers="2", single_layers="").args[0]
    only = model.clone()
    replacements(only)["double_block", 2] = lambda args, extra: args
    guider_full = bench.predict(bench.positive, {each: Row.FULL})
    weak = bench.cfg(only, 1.0)
    assert_same(bench.cfg(skipped), bench.cfg(model) + 3.0 * (guider_full - weak), 1e-4)
