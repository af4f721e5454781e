"""What guidance makes of the rows, under every guider of the host and beside its patches.

Each expectation is spelled out of separate plain predictions (`Bench.predict`), never of our own guidance code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench import (
    CFG,
    Bench,
    Row,
    ThreeWay,
    assert_differs,
    assert_same,
    counted_rows,
    guidance,
    random,
    simple_guidance,
)
from beside import ORDERS, in_order

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)


@pytest.mark.parametrize("cfg", [7.0, 1.0, 0.0])
def test_simple_guidance(bench: Bench, cfg: float) -> None:
    each = bench.application()
    ours = bench.cfg(bench.apply(each), cfg)
    assert_same(ours, simple_guidance(bench, each, cfg))
    assert_differs(ours, bench.cfg(bench.model, cfg))


@pytest.mark.parametrize("cfg", [7.0, 1.0, 0.0])
def test_three_way_guidance(bench: Bench, cfg: float) -> None:
    each = bench.application(three_way=SCALES)
    assert_same(bench.cfg(bench.apply(each), cfg), bench.three_way(each, cfg, SCALES))


ROWS = [
    (5.0, ThreeWay(2.0, 1.5), 4),
    (5.0, ThreeWay(2.0, 1.0), 3),  # no uncond
    (5.0, ThreeWay(5.0, 1.0), 2),  # neither uncond nor everything
    (5.0, ThreeWay(5.0, 5.0), 2),  # plain guidance
    (5.0, ThreeWay(2.0, 5.0), 3),  # no image
    (5.0, ThreeWay(0.0, 1.0), 2),  # neither uncond nor full
]


@pytest.mark.parametrize(("cfg", "scales", "rows"), ROWS)
def test_rows_that_count_for_nothing_cost_nothing(bench: Bench, cfg: float, scales: Any, rows: int) -> None:
    each = bench.application(three_way=scales)
    model, counts = counted_rows(bench.apply(each))
    ours = bench.cfg(model, cfg)
    assert sum(counts) == rows
    assert_same(ours, bench.three_way(each, cfg, scales), 1e-4)


def test_dropped_row_is_there_for_a_patch_that_reads_it(bench: Bench) -> None:
    """The negative prediction counts for nothing here, yet a patch that looks at it finds the true one."""
    scales = ThreeWay(2.0, 1.0)
    each = bench.application(three_way=scales)
    seen = []
    model = bench.apply(each).clone()
    model.set_model_sampler_post_cfg_function(lambda args: (seen.append(args["uncond_denoised"]), args["denoised"])[1])
    assert_same(bench.cfg(model), bench.three_way(each, CFG, scales), 1e-4)
    assert_same(seen[0], bench.predict(bench.negative, {each: Row.UNCOND}))


def test_rescale_cfg_reads_both_predictions(bench: Bench) -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    scales = ThreeWay(2.0, 1.0)
    each = bench.application(three_way=scales)
    (plain,) = RescaleCFG().patch(bench.apply(bench.application(three_way=None)), 0.7)
    (ours,) = RescaleCFG().patch(bench.apply(each), 0.7)
    correction = bench.three_way(each, CFG, scales) - simple_guidance(bench, each)
    assert_same(bench.cfg(ours), bench.cfg(plain) + correction, 1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_what_normalises_guidance_normalises_ours_in_either_order(bench: Bench, order: str) -> None:
    def to_the_positives_norm(args: dict) -> torch.Tensor:
        return args["denoised"] * (args["cond_denoised"].norm() / args["denoised"].norm())

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(to_the_positives_norm)
        return clone

    each = bench.application(three_way=SCALES)
    guided, full = bench.three_way(each, CFG, SCALES), bench.predict(bench.positive, {each: Row.FULL})
    assert_same(bench.cfg(in_order(bench, order, patch, each)), guided * (full.norm() / guided.norm()), 1e-4)


def test_the_scale_is_the_one_that_was_used(bench: Bench) -> None:
    """A guider that guides at another scale than its ``cfg``: a row that seemed not to count is made up for."""
    import comfy.samplers

    scales = ThreeWay(CFG, 1.5)
    each = bench.application(three_way=scales)

    class AtScale3(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
            negative, positive = self.conds["negative"], self.conds["positive"]
            arguments = (self.inner_model, x, timestep, negative, positive, 3.0)
            return comfy.samplers.sampling_function(*arguments, model_options=model_options, seed=seed)

    guider = AtScale3(bench.apply(each))
    guider.set_conds(bench.positive, bench.negative)
    guider.set_cfg(CFG)
    assert_same(bench.denoised(guider), bench.three_way(each, 3.0, scales), 1e-4)


def test_basic_guider(bench: Bench) -> None:
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    each = bench.application(three_way=SCALES)
    guider = Guider_Basic(bench.apply(each))
    guider.set_conds(bench.positive)
    assert_same(bench.denoised(guider), bench.predict(bench.positive, {each: Row.FULL}))


@pytest.mark.parametrize("nested", [False, True])
def test_dual_cfg_guider(bench: Bench, nested: bool) -> None:
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    each = bench.application(three_way=SCALES)
    middle_text = bench.text("a dog")
    guider = Guider_DualCFG(bench.apply(each))
    guider.set_conds(bench.positive, middle_text, bench.negative)
    guider.set_cfg(4.0, 2.0, nested=nested)
    positive = bench.predict(bench.positive, {each: Row.FULL})
    middle = bench.predict(middle_text, {each: Row.FULL})
    negative = bench.predict(bench.negative, {each: Row.UNCOND})
    if nested:
        expected = negative + 2.0 * (middle + 4.0 * (positive - middle) - negative)
    else:
        expected = negative + 2.0 * (middle - negative) + 4.0 * (positive - middle)
    assert_same(bench.denoised(guider), expected)


def test_perp_neg_guider(bench: Bench) -> None:
    from comfy_extras.nodes_perpneg import Guider_PerpNeg, perp_neg

    each = bench.application(three_way=SCALES)
    guider = Guider_PerpNeg(bench.apply(each))
    guider.set_conds(bench.positive, bench.negative, bench.empty)
    guider.set_cfg(5.0, 0.8)
    x = random(1, 4, 8, 8)
    positive = bench.predict(bench.positive, {each: Row.FULL}, x=x)
    negative = bench.predict(bench.negative, {each: Row.UNCOND}, x=x)
    empty = bench.predict(bench.empty, {each: Row.UNCOND}, x=x)
    assert_same(bench.denoised(guider, x), perp_neg(x, positive, negative, empty, 0.8, 5.0), 1e-4)


def extra_evaluation(scale: float, of: str) -> Any:
    """As self-attention and perturbed-attention guidance do: evaluates one list of conditionings alone."""
    import comfy.samplers

    def add(args: dict) -> torch.Tensor:
        (alone,) = comfy.samplers.calc_cond_batch(
            args["model"], [args[of]], args["input"] * 1.1, args["sigma"], args["model_options"]
        )
        return args["denoised"] + scale * alone

    return add


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("of", "row"), [("cond", Row.FULL), ("uncond", Row.UNCOND)])
def test_one_list_evaluated_alone(bench: Bench, of: str, row: Any, order: str) -> None:
    each = bench.application(three_way=SCALES)
    model = bench.model.clone() if order == "before" else bench.apply(each)
    model.set_model_sampler_post_cfg_function(extra_evaluation(0.3, of), disable_cfg1_optimization=True)
    model = bench.apply(each, model=model) if order == "before" else model
    text = bench.positive if of == "cond" else bench.negative
    x = random(1, 4, 8, 8)
    alone = bench.predict(text, {each: row}, x=x * 1.1)
    assert_same(bench.cfg(model, x=x), bench.three_way(each, CFG, SCALES, x=x) + 0.3 * alone, 1e-4)


@pytest.mark.parametrize("name", ["SAG", "PAG"])
def test_real_attention_guidance_nodes(full_bench: Bench, name: str) -> None:
    """The host's own nodes: at the scales where three-way equals simple guidance, they do the same in both."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    bench = full_bench
    patch = {
        "SAG": lambda model: SelfAttentionGuidance.execute(model, 0.8, 2.0).args[0],
        "PAG": lambda model: PerturbedAttentionGuidance.execute(model, 3.0).args[0],
    }[name]
    x = random(1, 4, 16, 16)
    results = {}
    for kind, scales in {"simple": None, "four rows": ThreeWay(CFG, CFG), "three-way": SCALES}.items():
        each = bench.application(three_way=scales)
        results[kind] = (bench.cfg(patch(bench.apply(each)), x=x), bench.cfg(bench.apply(each), x=x))
    assert_same(results["four rows"][0], results["simple"][0], 1e-4)
    assert_differs(results["simple"][0], results["simple"][1])
    # What the node adds depends on the negative and positive rows only, which are the same in both.
    added = [with_node - without for with_node, without in results.values()]
    assert_same(added[2], added[0], 2e-3)


def test_two_references_two_instructions(bench: Bench) -> None:
    """One guided three ways, one simply: the second keeps the text scale, whatever the first's scales."""
    first = bench.application(1, three_way=SCALES)
    second = bench.application(2)
    ours = bench.cfg(bench.apply(first, second))
    rows = {
        Row.FULL: bench.predict(bench.positive, {first: Row.FULL, second: Row.FULL}),
        Row.EVERYTHING: bench.predict(bench.negative, {first: Row.EVERYTHING, second: Row.FULL}),
        Row.IMAGE: bench.predict(bench.negative, {first: Row.IMAGE, second: Row.UNCOND}),
        Row.UNCOND: bench.predict(bench.negative, {first: Row.UNCOND, second: Row.UNCOND}),
    }
    assert_same(ours, guidance.three_way(rows, CFG, 2.0, 1.5), 1e-4)
    assert_same(bench.cfg(bench.apply(second, first)), ours, 1e-4)


def test_our_guider_sets_the_scales_for_all(bench: Bench) -> None:
    import importlib

    import inside

    guider_node = importlib.import_module(f"{inside.PACK}.nodes.guider").Guider
    each = bench.application(three_way=None)
    guider = guider_node.execute(bench.apply(each), bench.positive, bench.negative, CFG, 2.0, 1.5).args[0]
    assert_same(bench.denoised(guider), bench.three_way(each, CFG, SCALES), 1e-4)
    with pytest.raises(ValueError, match="nothing to guide"):
        guider_node.execute(bench.model, bench.positive, bench.negative, CFG, 2.0, 1.5)
