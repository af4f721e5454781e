"""Beside wrappers that split or reorder rows, and patches whose rows cannot be followed at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.samplers
import pytest
import torch
from bench import Bench, assert_differs, assert_same, counted_rows, random
from beside import ORDERS, SCALES, Patch, in_order, sampled


def one_row_a_call(bench: Bench) -> Patch:
    """A model wrapper that runs every row in a call of its own, the last first, and says so in the list of rows."""

    def apart(apply_model: Any, args: dict) -> torch.Tensor:
        shown, x, c = args["cond_or_uncond"], args["input"], args["c"]
        size = len(x) // len(shown)
        out = torch.empty_like(x)
        for i in reversed(range(len(shown))):
            rows = slice(i * size, (i + 1) * size)
            options = c["transformer_options"] | {"cond_or_uncond": [shown[i]]}
            part = {**c, "c_crossattn": c["c_crossattn"][rows], "transformer_options": options}
            out[rows] = apply_model(x[rows], args["timestep"][rows], **part)
        return out

    return wrapped_by(apart)


def rows_reversed(bench: Bench) -> Patch:
    def swapped(apply_model: Any, args: dict) -> torch.Tensor:
        shown, c = args["cond_or_uncond"], args["c"]
        options = c["transformer_options"] | {"cond_or_uncond": shown[::-1]}

        def back(t: torch.Tensor) -> torch.Tensor:
            return torch.cat(t.chunk(len(shown))[::-1])

        part = {**c, "c_crossattn": back(c["c_crossattn"]), "transformer_options": options}
        return back(apply_model(back(args["input"]), args["timestep"], **part))

    return wrapped_by(swapped)


def wrapped_by(wrapper: Callable) -> Patch:
    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    return patch


@pytest.mark.parametrize("scales", [None, *SCALES])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("patch", [one_row_a_call, rows_reversed])
def test_rows_split_and_reordered_by_a_wrapper(bench: Bench, patch: Any, order: str, scales: Any) -> None:
    """It leaves the numbers alone, so that what is right is what we do without it."""
    each = bench.application(three_way=scales)
    x = random(2, 4, 8, 8)
    ours = sampled(bench, in_order(bench, order, patch(bench), each), x=x)
    assert_same(ours, sampled(bench, bench.apply(each), x=x), 1e-4)


def test_rows_that_cannot_be_followed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A patch that adds a row out of nowhere: the picture is that of the model without the adapter, in one sentence."""

    def add(q: Any, k: Any, v: Any, options: dict) -> tuple:
        return torch.cat([q, q[:1], q[:1], q[:1]]), *(torch.cat([t, t[:1], t[:1], t[:1]]) for t in (k, v))

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn2_patch(add)
        clone.set_model_attn2_output_patch(lambda out, options: out[:-3])
        return clone

    x = random(2, 4, 8, 8)
    for scales in (None, SCALES[0]):
        caplog.clear()
        ours = sampled(bench, patch(bench.apply(bench.application(three_way=scales))), x=x)
        assert_same(ours, sampled(bench, bench.model, x=x), 1e-4)
        assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
            "Another patch changed the rows inside the model, so the adapter is off where it does."
        ]


def test_a_patch_that_needs_the_positive_in_every_call(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def needs_both(out: torch.Tensor, options: dict) -> torch.Tensor:
        options["cond_or_uncond"].index(0)
        return out

    model = bench.apply(bench.application(three_way=SCALES[0])).clone()
    model.set_model_attn1_output_patch(needs_both)
    assert_same(sampled(bench, model), sampled(bench, bench.apply(bench.application())), 1e-4)
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "simple guidance is used" in warning


def test_patches_that_treat_rows_alike_cost_nothing(bench: Bench) -> None:
    """The host's FreeU, among them, needs neither the rows that we leave out nor calls of their own."""
    from comfy_extras.nodes_freelunch import FreeU_V2

    each = bench.application(three_way=SCALES[1])
    (model,) = FreeU_V2().patch(bench.apply(each), 1.3, 1.4, 0.9, 0.2)
    counted, counts = counted_rows(model)
    sampled(bench, counted)
    assert counts == [3]


def test_followers_of_the_popular_kind_stay_in_the_call(bench: Bench) -> None:
    """A pack that shares our slot by its usual way knows its rows by number alone."""
    model = bench.apply(bench.application(three_way=SCALES[1])).clone()
    for slot in model.model_options["transformer_options"]["patches_replace"]["attn2"].values():
        slot.add(lambda out, q, k, v, extra_options: 0.1 * torch.tanh(q))
    counted, counts = counted_rows(model)
    sampled(bench, counted)
    assert counts == [3]


class Hints(torch.nn.Module):
    """A T2I-Adapter's network: what it adds is the mean of its hint."""

    unshuffle_amount = 8

    def forward(self, hint: torch.Tensor) -> dict:
        mean = hint.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return {"input": [None, None, mean.expand(-1, 320, 8, 8).contiguous()]}


@pytest.mark.parametrize("apart", [False, True])
def test_a_hint_for_each_latent_stays_when_rows_are_added(bench: Bench, apart: bool) -> None:
    """The host's T2I-Adapter keeps what it made for the rows of the first step, where the adapter did not act yet."""
    control = comfy.controlnet.T2IAdapter(Hints(), 3, 8, "nearest-exact")
    control.set_cond_hint(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), 1.0, (0.0, 1.0))
    lists = [
        [[text[0][0], text[0][1] | {"control": control, "control_apply_to_uncond": False}]]
        for text in (bench.positive, bench.negative)
    ]
    each = bench.application(three_way=SCALES[0], start_percent=0.5)
    model = rows_reversed(bench)(bench.apply(each)) if apart else bench.apply(each)
    x = random(2, 4, 8, 8)

    def seen(levels: list[float]) -> torch.Tensor:
        found = []

        def steps(model: Any, noise: Any, sigmas: Any, extra_args: dict, callback: Any, disable: Any) -> Any:
            found.extend(model(bench.noisy(x, level), torch.full((2,), level), **extra_args) for level in levels)
            return noise

        guider = bench.cfg_guider(model, positive=lists[0], negative=lists[1])
        nothing = torch.zeros_like(x)
        sampler = comfy.samplers.KSAMPLER(steps)
        guider.sample(nothing, nothing, sampler, torch.tensor([10.0, 0.5, 0.0]), disable_pbar=True, seed=0)
        return found[-1]

    assert_same(seen([10.0, 0.5]), seen([0.5]))
    assert_differs(seen([0.5]), bench.cfg(model, x=x, sigma=0.5))


@pytest.mark.parametrize(
    "kind, words",
    [
        (torch.cuda.OutOfMemoryError, ""),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "VRAM grow failed: 5 bytes"),  # of newer hosts' own memory
    ],
)
def test_a_lack_of_memory_is_the_hosts_to_tell(bench: Bench, kind: type[Exception], words: str) -> None:
    model = bench.apply(bench.application(three_way=SCALES[0]))

    def full(network: Any, inputs: tuple) -> None:
        if len(inputs[0]) > 2:
            raise kind(words)

    hook = model.model.diffusion_model.register_forward_pre_hook(full)
    try:
        with pytest.raises(kind, match=words):
            bench.cfg(model)
    finally:
        hook.remove()
