"""Which row gets which tokens, and what guidance makes of them, under every guider and patch of the host.

Each expectation is spelled out of separate plain predictions (`Bench.predict`), never of our own guidance code.
"""

from __future__ import annotations

import inspect
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
    guidance,
    random,
    tokens,
)
from tools.tiny_models import MIN_ADAPTER, MIN_CHECKPOINT

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)


@pytest.fixture(scope="module")
def bench(tiny_models: Path) -> Bench:
    return Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def simple(bench: Bench, each: Any, cfg: float = CFG, **kwargs: Any) -> torch.Tensor:
    full = bench.predict(bench.positive, {each: Row.FULL}, **kwargs)
    uncond = bench.predict(bench.negative, {each: Row.UNCOND}, **kwargs)
    return uncond + cfg * (full - uncond)


@pytest.mark.parametrize("cfg", [7.0, 1.0, 0.0])
def test_simple_guidance(bench: Bench, cfg: float) -> None:
    each = bench.application()
    ours = bench.cfg(bench.apply(each), cfg)
    assert_same(ours, simple(bench, each, cfg))
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


def counted_rows(model: Any) -> tuple[Any, list[int]]:
    """A clone that notes how many rows the model is asked for; a wrapper that leaves the numbers alone."""
    counts: list[int] = []
    clone = model.clone()

    def count(apply_model: Any, args: dict) -> torch.Tensor:
        counts.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(count)
    return clone, counts


@pytest.mark.parametrize(("cfg", "scales", "rows"), ROWS)
def test_rows_that_count_for_nothing_cost_nothing(bench: Bench, cfg: float, scales: Any, rows: int) -> None:
    each = bench.application(three_way=scales)
    model, counts = counted_rows(bench.apply(each))
    assert_same(bench.cfg(model, cfg), bench.three_way(each, cfg, scales), 1e-4)
    assert sum(counts) == rows


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
    correction = bench.three_way(each, CFG, scales) - simple(bench, each)
    assert_same(bench.cfg(ours), bench.cfg(plain) + correction, 1e-4)


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


@pytest.mark.parametrize("order", ["before", "after"])
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
def test_real_attention_guidance_nodes(tiny_full: Bench, name: str) -> None:
    """The host's own nodes: at the scales where three-way equals simple guidance, they do the same in both."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    bench = tiny_full
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


@pytest.fixture(scope="module")
def tiny_full(tiny_models: Path) -> Bench:
    from tools.tiny_models import TINY_NAMES

    checkpoint = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
    return Bench(tiny_models, checkpoint, TINY_NAMES["ip-adapter-instruct-sd15.bin"])


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


def test_conditioning_hooks(tiny_full: Bench, tiny_models: Path) -> None:
    """A LoRA hooked to the positive prompt only: rows run apart, each with its own tokens."""
    import comfy.hooks
    import comfy.utils
    from tools.tiny_models import TINY_NAMES

    bench = tiny_full
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
    left = simple(bench, each, x=x[..., :4])
    right = simple(bench, each, x=x[..., 4:])
    assert_same(bench.cfg(model, x=x), torch.cat([left, right], dim=-1), 1e-4)


def test_keys_and_values_once_a_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    adapter = bench.adapter.adapter
    original = type(adapter).key_values
    monkeypatch.setattr(type(adapter), "key_values", lambda self, t: (calls.append(1), original(self, t))[1])
    model = bench.apply(bench.application(three_way=SCALES))
    first = bench.denoised(bench.cfg_guider(model), calls=6)
    assert len(calls) == 1
    assert_same(first, bench.denoised(bench.cfg_guider(model), calls=1))
    assert len(calls) == 2
