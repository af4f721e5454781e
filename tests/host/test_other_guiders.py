"""Guiders and guidance that are not the host's: a cfg that is not one number, a negative that comes and goes, lists of
other names, step caches. Each stands for a pack's kind, written anew; each result is a sum of separate predictions."""

from __future__ import annotations

import importlib
import logging
import uuid
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import inside
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
    random,
    simple_guidance,
)
from beside import ORDERS, in_order

SCALES = ThreeWay(2.0, 1.5)
FEW = ThreeWay(2.0, 1.0)  # the negative counts for nothing
EARLY, LATE = 8.0, 1.0  # two noise levels


def at_levels(guider: Any, levels: list[float], x: torch.Tensor) -> list[torch.Tensor]:
    """What a guider says at each noise level, in one run."""
    seen: list[torch.Tensor] = []

    def sample(model: Any, noise: Any, sigmas: Any, extra_args: dict, callback: Any, disable: Any) -> torch.Tensor:
        for sigma in sigmas[:-1]:
            seen.append(model(x * (1 + sigma**2) ** 0.5, sigma.expand(len(x)), **extra_args))
        return noise

    nothing = torch.zeros_like(x)
    sampler, sigmas = comfy.samplers.KSAMPLER(sample), torch.tensor([*levels, 0.0])
    guider.sample(nothing, nothing, sampler, sigmas, disable_pbar=True, seed=0)
    return seen


def guider_of(bench: Bench, kind: type, model: Any, cfg: Any) -> Any:
    guider = kind(model)
    guider.set_conds(bench.positive, bench.negative)
    guider.set_cfg(cfg)
    return guider


def guided(guider: Any, x: Any, timestep: Any, options: dict, cfg: Any, negative: Any = ...) -> torch.Tensor:
    negative = guider.conds["negative"] if negative is ... else negative
    return comfy.samplers.sampling_function(
        guider.inner_model, x, timestep, negative, guider.conds["positive"], cfg, model_options=options
    )


class CfgOfEachStep(comfy.samplers.CFGGuider):
    def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
        return guided(self, x, timestep, model_options, self.cfg[0 if timestep[0] > 3 else 1])


@pytest.mark.parametrize("scales", [None, SCALES, FEW])
def test_a_cfg_for_each_step(bench: Bench, scales: Any) -> None:
    each = bench.application(three_way=scales)
    x = random(1, 4, 8, 8)
    found = at_levels(guider_of(bench, CfgOfEachStep, bench.apply(each), [7.0, 3.0]), [EARLY, LATE], x)
    for ours, cfg, sigma in zip(found, (7.0, 3.0), (EARLY, LATE), strict=True):
        at = {"x": x, "sigma": sigma}
        used = scales or ThreeWay(cfg, cfg)
        assert_same(ours, bench.three_way(each, cfg, used, **at), 1e-4)


class CfgOfEachLatent(comfy.samplers.CFGGuider):
    def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
        lists = [self.conds["positive"], self.conds["negative"]]
        out = comfy.samplers.calc_cond_batch(self.inner_model, lists, x, timestep, model_options)
        return comfy.samplers.cfg_function(
            self.inner_model, *out, self.cfg, x, timestep, model_options=model_options, cond=lists[0], uncond=lists[1]
        )


@pytest.mark.parametrize("scales", [None, SCALES, FEW])
def test_a_cfg_for_each_latent(bench: Bench, scales: Any) -> None:
    each = bench.application(three_way=scales)
    x, cfgs = random(2, 4, 8, 8), (7.0, 2.0)
    guider = guider_of(bench, CfgOfEachLatent, bench.apply(each), torch.tensor(cfgs).view(2, 1, 1, 1))
    found = bench.denoised(guider, x=x)
    for i, cfg in enumerate(cfgs):
        used = scales or ThreeWay(cfg, cfg)
        assert_same(found[i : i + 1], bench.three_way(each, cfg, used, x=x[i : i + 1]), 1e-4)


@pytest.mark.parametrize("cfgs", [(7.0, 2.0), (3.0, 3.0)])
@pytest.mark.parametrize("scales", [None, SCALES, FEW])
@pytest.mark.parametrize("order", ORDERS)
def test_a_formula_that_guides_by_a_cfg_of_its_own(bench: Bench, order: str, scales: Any, cfgs: tuple) -> None:
    """One that rises from frame to frame (VideoLinearCFGGuidance), or is set for the step."""

    def formula(args: dict) -> torch.Tensor:
        return args["uncond"] + torch.tensor(cfgs).view(2, 1, 1, 1) * (args["cond"] - args["uncond"])

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_sampler_cfg_function(formula)
        return clone

    each, x = bench.application(three_way=scales), random(2, 4, 8, 8)
    found = bench.cfg(in_order(bench, order, patch, each), x=x)
    for i, cfg in enumerate(cfgs):
        used = scales or ThreeWay(cfg, cfg)
        assert_same(found[i : i + 1], bench.three_way(each, cfg, used, x=x[i : i + 1]), 1e-4)


class NegativeEarlyOnly(comfy.samplers.CFGGuider):
    """Its cfg is a schedule of its own kind, and late steps have no negative."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
        early = bool(timestep[0] > 3)
        negative = self.conds["negative"] if early else None
        return guided(self, x, timestep, model_options, self.cfg["early"] if early else 1.0, negative)


@pytest.mark.parametrize("scales", [None, SCALES, FEW])
def test_steps_without_a_negative(bench: Bench, scales: Any) -> None:
    each = bench.application(three_way=scales)
    x = random(1, 4, 8, 8)
    early, late = at_levels(guider_of(bench, NegativeEarlyOnly, bench.apply(each), {"early": CFG}), [EARLY, LATE], x)
    assert_same(early, bench.three_way(each, CFG, scales or ThreeWay(CFG, CFG), x=x, sigma=EARLY), 1e-4)
    assert_same(late, bench.predict(bench.positive, {each: Row.FULL}, x=x, sigma=LATE), 1e-4)


def stops_in_its_formula(model: Any) -> Any:
    """Both rows are evaluated, and late the negative is left out of the sum."""

    def formula(args: dict) -> torch.Tensor:
        positive, negative = args["cond"], args["uncond"]
        return negative + args["cond_scale"] * (positive - negative) if args["sigma"][0] > 3 else positive

    clone = model.clone()
    clone.set_model_sampler_cfg_function(formula)
    return clone


def stops_before_the_model(model: Any) -> Any:
    """Late the negative is not evaluated, and the positive stands in for it."""

    def only_positive(executor: Any, inner: Any, conds: list, x: Any, timestep: Any, options: dict) -> list:
        if len(conds) < 2 or timestep[0] > 3:
            return executor(inner, conds, x, timestep, options)
        out = executor(inner, [conds[0], None, *conds[2:]], x, timestep, options)
        return [out[0], out[0], *out[2:]]

    clone = model.clone()
    clone.add_wrapper_with_key("calc_cond_batch", "skip", only_positive)
    return clone


@pytest.mark.parametrize("scales", [None, SCALES, FEW])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stops", [stops_in_its_formula, stops_before_the_model])
def test_a_negative_that_stops_half_way(bench: Bench, stops: Any, order: str, scales: Any) -> None:
    """What is left is the positive's prediction, to which three-way guidance has nothing to add."""
    each = bench.application(three_way=scales)
    model = bench.apply(each, model=stops(bench.model)) if order == "before" else stops(bench.apply(each))
    x = random(1, 4, 8, 8)
    early, late = at_levels(bench.cfg_guider(model), [EARLY, LATE], x)
    assert_same(early, bench.three_way(each, CFG, scales or ThreeWay(CFG, CFG), x=x, sigma=EARLY), 1e-4)
    assert_same(late, bench.predict(bench.positive, {each: Row.FULL}, x=x, sigma=LATE), 1e-4)


def each_list_in_a_call(bends: bool) -> Any:
    """A patch that evaluates the two lists apart, with the negative halved in ``bends``."""
    import comfy.samplers

    def apart(args: dict) -> list[torch.Tensor]:
        model, x, sigma, options = (args[name] for name in ("model", "input", "sigma", "model_options"))
        positive, negative = args["conds"]
        full, _ = comfy.samplers.calc_cond_batch(model, [positive, None], x, sigma, options)
        _, uncond = comfy.samplers.calc_cond_batch(model, [None, negative], x, sigma, options)
        return [full, uncond / 2 if bends else uncond]

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_sampler_calc_cond_batch_function(apart)
        return clone

    return patch


@pytest.mark.parametrize("scales", [None, SCALES, FEW])
@pytest.mark.parametrize("order", ORDERS)
def test_lists_that_are_evaluated_apart(bench: Bench, order: str, scales: Any) -> None:
    each = bench.application(three_way=scales)
    ours = bench.cfg(in_order(bench, order, each_list_in_a_call(bends=False), each), calls=2)
    assert_same(ours, bench.three_way(each, CFG, scales or ThreeWay(CFG, CFG)), 1e-4)


def test_lists_that_are_evaluated_apart_and_bent(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    each = bench.application(three_way=SCALES)
    ours = bench.cfg(in_order(bench, "after", each_list_in_a_call(bends=True), each))
    full, uncond = bench.predict(bench.positive, {each: Row.FULL}), bench.predict(bench.negative, {each: Row.UNCOND})
    assert_same(ours, uncond / 2 + CFG * (full - uncond / 2), 1e-4)
    assert "simple guidance is used" in caplog.text


def with_step_cache(model: Any) -> Any:
    """Late steps give again what was kept of each row, by its uuid."""
    kept: dict[Any, torch.Tensor] = {}

    def cached(executor: Any, x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = kwargs.get("transformer_options") or args[-1]
        if options["sigmas"][0] < 3:
            return torch.cat([kept[key] for key in options["uuids"]])
        out = executor(x, *args, **kwargs)
        kept.update(zip(options["uuids"], out.chunk(len(options["uuids"])), strict=True))
        return out

    clone = model.clone()
    clone.add_wrapper_with_key("diffusion_model", "cache", cached)
    return clone


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_cache_that_skips_while_a_range_begins(
    bench: Bench, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    x, found = random(1, 4, 8, 8), {}
    for scales in (None, SCALES):
        each = bench.application(three_way=scales, start_percent=0.5)
        model = bench.apply(each, model=with_step_cache(bench.model))
        model = model if order == "before" else with_step_cache(bench.apply(each))
        found[scales] = at_levels(bench.cfg_guider(model), [EARLY, LATE], x)
    assert torch.equal(found[SCALES][1], found[None][1])
    assert "simple guidance is used" in caplog.text


@pytest.mark.parametrize("order", ORDERS)
def test_the_hosts_step_cache(bench: Bench, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """All rows of a step are in one call, which it skips or not; where a range begins within a skip, it cannot, or
    on newer hosts evaluates the rows that it does not know."""
    from comfy_extras.nodes_easycache import EasyCacheHolder, EasyCacheNode

    def applied(each: Any, threshold: float) -> Any:
        first = EasyCacheNode.execute(bench.model, threshold, 0.0, 1.0, False).args[0]
        if order == "before":
            return bench.apply(each, model=first)
        return EasyCacheNode.execute(bench.apply(each), threshold, 0.0, 1.0, False).args[0]

    x, levels = random(1, 4, 8, 8), [12.0, 10.0, 8.0, 6.0, LATE]
    each = bench.application(three_way=SCALES)
    model, counts = counted_rows(applied(each, 1e9))
    at_levels(bench.cfg_guider(model), levels, x)
    assert set(counts) == {4}
    late = bench.application(three_way=SCALES, start_percent=0.5)
    simple = bench.application(start_percent=0.5)
    ours, theirs = (at_levels(bench.cfg_guider(applied(one, 1e9)), levels, x)[-1] for one in (late, simple))
    if hasattr(EasyCacheHolder, "can_apply_cache_diff"):
        assert_same(ours, at_levels(bench.cfg_guider(bench.apply(late)), levels, x)[-1])
    else:
        assert torch.equal(ours, theirs)
        assert "simple guidance is used" in caplog.text


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize(
    "names",
    [("cond", "uncond"), ("pos_prompt", "neg_prompt"), ("first", "second"), ("b", "a")]
    + [("main", "negative"), ("cond_2", "cond_1")],
)
def test_lists_of_other_names(bench: Bench, names: tuple, scales: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Named(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
            positive, negative = (self.conds[name] for name in names)
            arguments = (self.inner_model, x, timestep, negative, positive, self.cfg)
            return comfy.samplers.sampling_function(*arguments, model_options=model_options)

    caplog.set_level(logging.INFO, "ipadapter_instruct")
    each = bench.application(three_way=scales)
    guider = Named(bench.apply(each))
    lists = dict(zip(names, (bench.positive, bench.negative), strict=True))
    guider.inner_set_conds(dict(sorted(lists.items())))
    guider.set_cfg(CFG)
    assert_same(bench.denoised(guider), bench.three_way(each, CFG, scales or ThreeWay(CFG, CFG)), 1e-4)
    said = " ".join(record.message for record in caplog.records if record.name == "ipadapter_instruct")
    assert f"{names[0]} for the positive" in said or f"{names[0]} is: taken for the positive" in said


def test_a_guider_that_combines_in_its_own_way(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """It calls none of the host's guidance functions: simple guidance, with both of its rows, in one sentence."""

    class Own(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
            lists = [self.conds["positive"], self.conds["negative"]]
            full, uncond = comfy.samplers.calc_cond_batch(self.inner_model, lists, x, timestep, model_options)
            return uncond + self.cfg * (full - uncond)

    each = bench.application(three_way=FEW)
    guider = guider_of(bench, Own, bench.apply(each), CFG)
    assert_same(bench.denoised(guider, calls=4), simple_guidance(bench, each), 1e-4)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "simple guidance is used" in warning


def test_cfg_1_and_guidance_that_the_task_chose(bench: Bench) -> None:
    """Models for cfg 1 were made to run without a negative: one row, and no guidance on top of theirs."""
    chosen = bench.application(three_way=ThreeWay(2.0, 1.5, automatic=True))
    model, counts = counted_rows(bench.apply(chosen))
    ours = bench.cfg(model, 1.0)
    assert counts == [1]
    assert_same(ours, bench.predict(bench.positive, {chosen: Row.FULL}))
    assert_same(bench.cfg(model), bench.three_way(chosen, CFG, SCALES), 1e-4)
    both = bench.apply(chosen)
    both.model_options["disable_cfg1_optimization"] = True  # another patch reads the negative at cfg 1 too
    assert_same(bench.cfg(both, 1.0), ours, 1e-4)
    asked = bench.application(three_way=SCALES)
    assert_same(bench.cfg(bench.apply(asked), 1.0), bench.three_way(asked, 1.0, SCALES), 1e-4)
    assert_differs(bench.cfg(bench.apply(asked), 1.0), ours)


def node(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{inside.PACK}.nodes.{module}"), name)


def test_auto_is_the_tasks_choice() -> None:
    adapter = SimpleNamespace(config=SimpleNamespace(follows_instructions=True))
    three_way = importlib.import_module(f"{inside.PACK}.nodes.apply")._three_way
    modes = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.tasks").GuidanceMode
    task = SimpleNamespace(guidance=modes.THREE_WAY, instruct_scale=2.0, image_scale=1.0)
    assert three_way(adapter, task, "auto", 3.0, 3.0) == ThreeWay(2.0, 1.0, automatic=True)
    assert three_way(adapter, task, "three-way", 3.0, 2.5) == ThreeWay(3.0, 2.5)


def test_weight_0_and_our_guider(bench: Bench) -> None:
    instruction = SimpleNamespace(config=bench.adapter.config)
    picture = torch.zeros(1, 8, 8, 3)
    settings = (0.0, 0.0, 1.0, "auto", 2.0, 1.0, "concatenate")
    applied = node("apply", "ApplyAdapter").execute(bench.model, bench.adapter, instruction, None, picture, *settings)
    lists = (bench.positive, bench.negative)
    guider = node("guider", "Guider").execute(applied.args[0], *lists, CFG, 2.0, 1.5).args[0]
    assert torch.equal(bench.denoised(guider), bench.cfg(bench.model))


class NegativeOfItsOwn(comfy.samplers.CFGGuider):
    """As newer hosts' guider of two models: a call for each list, the negative's of a copy that nobody has named."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = {}, seed: Any = None) -> torch.Tensor:
        lists = [self.conds["positive"], [cond | {"uuid": uuid.uuid4()} for cond in self.conds["negative"]]]
        cond, uncond = (
            comfy.samplers.calc_cond_batch(self.inner_model, [some], x, timestep, model_options)[0] for some in lists
        )
        return comfy.samplers.cfg_function(
            self.inner_model, cond, uncond, self.cfg, x, timestep, model_options, *lists
        )  # fmt: skip


def test_a_negative_that_is_a_copy_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    each = bench.application(three_way=SCALES)
    found = bench.denoised(guider_of(bench, NegativeOfItsOwn, bench.apply(each), CFG))
    assert_same(found, simple_guidance(bench, each), 1e-4)
    assert "evaluates a step's two prompts apart" in caplog.text
