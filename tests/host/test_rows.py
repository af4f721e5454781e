"""Which row gets which tokens: under areas, masks, hooks, windows, tiles, batches and rows split for memory.

Each expectation is spelled out of separate plain predictions (`Bench.predict`), never of our own guidance code.
"""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
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
    run_module,
    simple_guidance,
    tokens,
)

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)


def with_options(text: list, **options: Any) -> list:
    return [[cond, {**settings, **options}] for cond, settings in text]


@pytest.mark.parametrize("scales", [None, SCALES])
def test_area_conditioning(bench: Bench, scales: Any) -> None:
    """Two prompts in two halves. The host then samples the negative prompt over the whole and, as copies with the
    positive's area (and uuid), in each half; in the middle of a half the two count alike."""
    top, bottom = (4, 8, 0, 0), (4, 8, 4, 0)  # h, w, y, x in latent pixels
    dog = bench.text("a dog")
    positive = with_options(bench.positive, area=top) + with_options(dog, area=bottom)
    each = bench.application(three_way=scales)
    used = scales or ThreeWay(CFG, CFG)
    x = random(1, 4, 8, 8)
    ours = bench.cfg(bench.apply(each), positive=positive, x=x)
    for area, text in ((top, bench.positive), (bottom, dog)):
        half = slice(area[2], area[2] + area[0])
        cut = x[:, :, half]
        rows = {
            row: (
                bench.predict(bench.negative, {each: row}, x=x)[:, :, half]
                + bench.predict(bench.negative, {each: row}, x=cut)
            )
            / 2
            for row in Row
        }
        rows[Row.FULL] = bench.predict(text, {each: Row.FULL}, x=cut)
        expected = guidance.three_way(rows, CFG, used.instruct_scale, used.image_scale)
        assert_same(ours[:, :, half][:, :, 1:3], expected[:, :, 1:3], 1e-4)


def test_adapter_mask_under_area_conditioning(bench: Bench) -> None:
    """A mask of the whole picture is cut to each area: white over one area is the adapter there, and none elsewhere."""
    top = (4, 8, 0, 0)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1.0  # the upper half of the picture
    each = bench.application()
    masked = bench.application(mask=mask)
    bottom = (4, 8, 4, 0)
    for area, reference in ((top, bench.apply(each)), (bottom, bench.model)):
        positive = with_options(bench.positive, area=area)
        negative = with_options(bench.negative, area=area)
        half = slice(area[2], area[2] + area[0])
        ours = bench.cfg(bench.apply(masked), positive=positive, negative=negative)[:, :, half]
        assert_same(ours, bench.cfg(reference, positive=positive, negative=negative)[:, :, half], 1e-4)


def test_masked_conditioning(bench: Bench) -> None:
    half = torch.zeros(1, 8, 8)
    half[:, :, :4] = 1.0
    each = bench.application(three_way=SCALES)
    dog = bench.text("a dog")
    positive = with_options(bench.positive, mask=half, mask_strength=1.0, set_area_to_bounds=False) + with_options(
        dog, mask=1 - half, mask_strength=1.0, set_area_to_bounds=False
    )
    ours = bench.cfg(bench.apply(each), positive=positive)
    left = bench.three_way(each, CFG, SCALES)
    assert_same(ours[..., :4], left[..., :4], 1e-4)
    assert_differs(ours[..., 4:], left[..., 4:])


def test_rows_split_for_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    each = bench.application(three_way=SCALES)
    together = bench.cfg(bench.apply(each))
    monkeypatch.setattr(type(bench.model.model), "memory_required", lambda *args, **kwargs: 1e18)
    model, counts = counted_rows(bench.apply(each))
    assert_same(bench.cfg(model), together)
    assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize("scales", [None, SCALES])
def test_one_picture_for_each_latent(bench: Bench, scales: Any) -> None:
    each = bench.application(tokens=tokens(5, count=3), three_way=scales)
    x = random(3, 4, 8, 8)
    batch = bench.cfg(bench.apply(each), x=x)
    for i in range(3):
        one = bench.application(tokens={r: t[i : i + 1] for r, t in each.tokens.items()}, three_way=scales)
        assert_same(batch[i : i + 1], bench.cfg(bench.apply(one), x=x[i : i + 1]), 1e-4)


def test_fewer_pictures_than_latents_are_dealt_out_in_turn(bench: Bench) -> None:
    each = bench.application(tokens=tokens(5, count=2))
    batch = bench.cfg(bench.apply(each), x=random(1, 4, 8, 8).repeat(4, 1, 1, 1))
    assert_same(batch[:2], batch[2:])
    assert_differs(batch[:1], batch[1:2])


def in_windows(model: Any, length: int, overlap: int) -> Any:
    """The host's own node, over the batch; newer hosts ask for a few settings more."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode as Windows

    settings = {"model": model, "context_length": length, "context_overlap": overlap}
    settings |= {"context_schedule": "standard_static", "context_stride": 1, "closed_loop": False}
    settings |= {"fuse_method": "flat", "dim": 0}
    known = inspect.signature(Windows.execute).parameters
    more = {name: False for name, p in known.items() if name not in settings and p.default is p.empty}
    return Windows.execute(**settings, **more).args[0]


@pytest.mark.parametrize("scales", [None, SCALES, ThreeWay(2.0, 1.0)])
@pytest.mark.parametrize("cfg", [5.0, 1.0, 0.0])
def test_context_windows(bench: Bench, scales: Any, cfg: float) -> None:
    """Windows over the batch: each latent keeps its own picture, and windows blend the guided result."""
    each = bench.application(tokens=tokens(5, count=4), three_way=scales)
    x = random(4, 4, 8, 8)
    plain = bench.apply(each)
    windows = in_windows(plain, length=2, overlap=1)
    assert_same(bench.cfg(windows, cfg, x=x), bench.cfg(plain, cfg, x=x), 1e-4)


def test_conditioning_hooks(full_bench: Bench, tiny_models: Path) -> None:
    """A LoRA hooked to the positive prompt only: rows run apart, each with its own tokens."""
    import comfy.hooks
    import comfy.utils
    from tools.tiny.models import TINY_NAMES

    bench = full_bench
    lora = comfy.utils.load_torch_file(str(tiny_models / "loras" / TINY_NAMES["pixel_art_style_sd15.safetensors"]))
    x = random(1, 4, 8, 8)

    def hooked() -> list:
        hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
        return with_options(bench.positive, hooks=hooks)

    for scales in (None, SCALES):
        each = bench.application(three_way=scales)
        full = bench.predict(hooked(), {each: Row.FULL}, x=x)
        rest = {row: bench.predict(bench.negative, {each: row}, x=x) for row in Row if row is not Row.FULL}
        rows = {Row.FULL: full, **rest}
        used = scales or ThreeWay(CFG, CFG)
        expected = guidance.three_way(rows, CFG, used.instruct_scale, used.image_scale)
        assert_same(bench.cfg(bench.apply(each), positive=hooked(), x=x), expected, 1e-4)
        assert_differs(full, bench.predict(bench.positive, {each: Row.FULL}, x=x))


def test_range_switches_adapter_and_guidance_off(bench: Bench) -> None:
    """Outside its range a three-way application leaves the bare model at the sampler's own cfg, bit for bit."""
    sampling = bench.model.get_model_object("model_sampling")
    middle = float(sampling.percent_to_sigma(0.5))
    each = bench.application(three_way=SCALES, start_percent=0.5)
    model = bench.apply(each)
    assert torch.equal(bench.cfg(model, 7.0, sigma=middle * 1.5), bench.cfg(bench.model, 7.0, sigma=middle * 1.5))
    late = bench.cfg(model, 7.0, sigma=middle * 0.5)
    always = bench.apply(bench.application(three_way=SCALES))
    assert_same(late, bench.cfg(always, 7.0, sigma=middle * 0.5))
    early = bench.apply(bench.application(three_way=SCALES, end_percent=0.5))
    assert torch.equal(bench.cfg(early, 7.0, sigma=middle * 0.5), bench.cfg(bench.model, 7.0, sigma=middle * 0.5))
    assert_same(bench.cfg(early, 7.0, sigma=middle * 1.5), bench.cfg(always, 7.0, sigma=middle * 1.5))


def test_tiles_stacked_by_a_model_wrapper(bench: Bench) -> None:
    """A tiling wrapper stacks its tiles, each with all rows; tokens follow."""
    each = bench.application()
    model = bench.apply(each).clone()

    def tile(apply_model: Any, args: dict) -> torch.Tensor:
        x, c = args["input"], dict(args["c"])
        tiles = torch.cat([x[..., :4], x[..., 4:]])
        c["c_crossattn"] = c["c_crossattn"].repeat(2, 1, 1)
        out = apply_model(tiles, args["timestep"].repeat(2), **c)
        return torch.cat(out.chunk(2), dim=-1)

    model.set_model_unet_function_wrapper(tile)
    x = random(1, 4, 8, 8)
    left = simple_guidance(bench, each, x=x[..., :4])
    right = simple_guidance(bench, each, x=x[..., 4:])
    assert_same(bench.cfg(model, x=x), torch.cat([left, right], dim=-1), 1e-4)


def test_keys_and_values_once_a_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    adapter = bench.adapter.adapter
    original = type(adapter).key_values
    monkeypatch.setattr(type(adapter), "key_values", lambda *each: (calls.append(1), original(*each))[1])
    model = bench.apply(bench.application(three_way=SCALES))
    first = bench.denoised(bench.cfg_guider(model), calls=6)
    assert len(calls) == 1
    assert_same(first, bench.denoised(bench.cfg_guider(model), calls=1))
    assert len(calls) == 2


@pytest.mark.parametrize("told", [False, True])
def test_parts_of_the_batch(bench: Bench, told: bool) -> None:
    """A wrapper that runs the latents in two halves. With one picture it needs no telling which; with one for each
    latent, AnimateDiff's windows tell it."""
    each = bench.application(tokens=tokens(5, count=4 if told else 1), three_way=SCALES)
    plain = bench.apply(each)
    model = plain.clone()

    def in_halves(apply_model: Any, args: dict) -> torch.Tensor:
        rows = len(args["cond_or_uncond"])
        x, timestep, c = args["input"], args["timestep"], args["c"]
        out = torch.empty_like(x)
        for half in ([0, 1], [2, 3]):
            places = [row * 4 + i for row in range(rows) for i in half]
            options = c["transformer_options"] | ({"ad_params": {"sub_idxs": half}} if told else {})
            part = {**c, "c_crossattn": c["c_crossattn"][places], "transformer_options": options}
            out[places] = apply_model(x[places], timestep[places], **part)
        return out

    model.set_model_unet_function_wrapper(in_halves)
    x = random(4, 4, 8, 8)
    assert_same(bench.cfg(model, x=x), bench.cfg(plain, x=x), 1e-4)


@pytest.mark.parametrize("pictures, most", [(1, 1), (24, 16)])
def test_windows_that_move_with_each_step_leave_little_behind(bench: Bench, pictures: int, most: int) -> None:
    """Keys and values are kept for the arrangements of a run that come again, not for each window that ever was."""
    each = bench.application(tokens=tokens(5, count=pictures))
    plain, kept = bench.apply(each), []
    model = plain.clone()
    steps = itertools.count()

    def in_halves(apply_model: Any, args: dict) -> torch.Tensor:
        rows, step = len(args["cond_or_uncond"]), next(steps)
        x, timestep, c = args["input"], args["timestep"], args["c"]
        out = torch.empty_like(x)
        for first in (0, 12):
            window = [(first + step + i) % 24 for i in range(12)]
            places = [row * 24 + i for row in range(rows) for i in window]
            options = c["transformer_options"] | {"ad_params": {"sub_idxs": window}}
            part = {**c, "c_crossattn": c["c_crossattn"][places], "transformer_options": options}
            out[places] = apply_model(x[places], timestep[places], **part)
            run = options[run_module.RUN]
            kept.append(len(run.calls) + len(run.windows))
        return out

    model.set_model_unet_function_wrapper(in_halves)
    x = random(24, 4, 8, 8)
    assert_same(bench.cfg(model, x=x, calls=12), bench.cfg(plain, x=x), 1e-4)
    assert max(kept) == most
