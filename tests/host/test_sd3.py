"""SD3: the same rows, guidance, masks, chains and clones as on UNets, on the host's own transformer.

Expectations are spelled out of separate plain predictions, as in test_guidance.py.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from bench import (
    Application,
    Row,
    Sd3Bench,
    ThreeWay,
    assert_differs,
    assert_same,
    counted_rows,
    guidance,
    host_apply,
    random,
    simple_guidance,
    slots,
    tokens,
)
from tools.tiny.models import sd3_checkpoint
from tools.tiny.sd3 import WIDTH, controlnet

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)
CFG = 6.0


@pytest.fixture
def bench(sd3_bench: Sd3Bench) -> Sd3Bench:
    return sd3_bench


def replacements(model: Any) -> dict:
    return model.model_options["transformer_options"]["patches_replace"]["dit"]


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


# Masks.


@pytest.mark.parametrize(
    ("size", "mask_shape"), [((8, 8), (64, 64)), ((8, 24), (1, 1)), ((9, 7), (3, 500)), ((17, 20), (700, 20))]
)
def test_masks_of_any_shape_on_any_picture(bench: Sd3Bench, size: tuple, mask_shape: tuple) -> None:
    x = random(1, 16, *size)
    white, black = (bench.application(mask=value * torch.ones(1, *mask_shape)) for value in (1.0, 0.0))
    assert_same(bench.cfg(bench.apply(white), x=x), bench.cfg(bench.apply(bench.application()), x=x))
    assert torch.equal(bench.cfg(bench.apply(black), x=x), bench.cfg(bench.model, x=x))


def test_a_mask_lies_where_it_was_drawn(bench: Sd3Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to each position of picture and text: in a right half, and to the text half as strongly."""
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
    assert_same(masked[:, :text], 0.5 * whole[:, :text])


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


# Clones, re-runs, other patches.


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
    assert len(calls) == 4


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


def test_lora(bench: Sd3Bench) -> None:
    """On the attention, the MLP and the text's embedding, which tokens go through too: as if merged by hand."""
    down, up = random(4, WIDTH, seed=1) / 16, random(WIDTH, 4, seed=2)
    keys = {
        "context_embedder": (random(4, 4096, seed=3) / 64, up),
        "joint_blocks.0.x_block.attn.proj": (down, up),
        "joint_blocks.2.context_block.mlp.fc2": (random(4, 4 * WIDTH, seed=4) / 32, up),
    }
    lora = {}
    for key, (a, b) in keys.items():
        name = f"diffusion_model.{key}"
        lora |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    with_lora, _ = comfy.sd.load_lora_for_models(bench.model, None, lora, 0.5, 0.0)
    assert len(with_lora.patches) == 3
    each, bare = bench.application(), bench.cfg(bench.model)
    ours = bench.cfg(bench.apply(each, model=with_lora))
    state = sd3_checkpoint(seed=13)
    weights = {k.removeprefix("model.diffusion_model."): v for k, v in state.items() if "diffusion_model" in k}
    for key, (a, b) in keys.items():
        weights[f"{key}.weight"] = weights[f"{key}.weight"] + 0.5 * b @ a
    merged = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
    assert_same(ours, bench.cfg(bench.apply(each, model=merged)), 1e-4)
    assert_differs(ours, bench.cfg(bench.apply(each)))
    assert_same(bench.cfg(bench.model), bare)


def test_controlnet(bench: Sd3Bench, tmp_path: Any) -> None:
    """The host's SD3 ControlNet beside ours: its own blocks never meet the adapter."""
    import comfy.controlnet

    torch.save(controlnet(seed=14), tmp_path / "canny.pth")
    control = comfy.controlnet.load_controlnet(str(tmp_path / "canny.pth"))
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def controlled(text: list) -> list:
        network = control.copy().set_cond_hint(hint, 1.0, (0.0, 1.0), bench.vae)
        return [[c, o | {"control": network, "control_apply_to_uncond": False}] for c, o in text]

    texts = {"positive": controlled(bench.positive), "negative": controlled(bench.negative)}
    each = bench.application()
    ours = bench.cfg(bench.apply(each), **texts)
    full = bench.predict(texts["positive"], {each: Row.FULL})
    uncond = bench.predict(texts["negative"], {each: Row.UNCOND})
    assert_same(ours, uncond + 5.0 * (full - uncond), 1e-4)
    for other in (bench.cfg(bench.apply(each)), bench.cfg(bench.model, **texts)):
        assert_differs(ours, other)


# Precision, memory, compilation.


def test_fp8_base(bench: Sd3Bench) -> None:
    """As Load Diffusion Model's fp8: the same as a float model of the rounded weights."""
    state = {
        k.removeprefix("model.diffusion_model."): v for k, v in sd3_checkpoint(seed=13).items() if "diffusion" in k
    }
    fp8 = comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": torch.float8_e4m3fn})
    assert next(fp8.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn
    rounded = {key: value.to(torch.float8_e4m3fn).float() for key, value in state.items()}
    plain = comfy.sd.load_diffusion_model_state_dict(rounded, model_options={"dtype": torch.float32})
    each = bench.application()
    fp8.model.manual_cast_dtype = torch.float32  # whatever this machine would choose
    assert_same(bench.cfg(bench.apply(each, model=fp8)), bench.cfg(bench.apply(each, model=plain)), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapter_on_a_float_model(tiny_models: Any, bench: Sd3Bench, dtype: torch.dtype) -> None:
    from tools.tiny.models import TINY_NAMES

    names = (TINY_NAMES["sd3_medium_incl_clips_t5xxlfp8.safetensors"], "ip-adapter-instruct-sd3.bin")
    other = Sd3Bench(tiny_models, *names, torch.float32)
    other.adapter.adapter.to(dtype)
    each = bench.application()
    half = Application(other.adapter, each.tokens, 1.0)
    assert_same(other.cfg(other.apply(half)), bench.cfg(bench.apply(each)), 2e-2)


def test_weights_are_the_hosts_to_manage(bench: Sd3Bench) -> None:
    model = bench.apply(bench.application())
    before = bench.cfg(model)
    comfy.model_management.unload_all_models()
    assert torch.equal(bench.cfg(model), before)


def test_keys_and_values_once_a_run(bench: Sd3Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, adapter = [], type(bench.adapter.adapter)
    original = adapter.key_values
    monkeypatch.setattr(adapter, "key_values", lambda *each: (calls.append(1), original(*each))[1])
    bench.denoised(bench.cfg_guider(bench.apply(bench.application(three_way=SCALES))), calls=4)
    assert len(calls) == 1


# Models and files of other families.


def test_models_and_adapters_of_other_families_are_named(bench: Sd3Bench, tiny_models: Any, full_bench: Any) -> None:
    sd35 = comfy.sd.load_diffusion_model_state_dict(
        {k.removeprefix("model.diffusion_model."): v for k, v in sd3_checkpoint(13, True).items() if "diffusion" in k},
        model_options={"dtype": torch.float32},
    )
    assert torch.isfinite(bench.cfg(sd35)).all()
    cases = [
        (sd35, bench.adapter, "SD3 (2 attentions)", "SD3.5 (2)"),
        (full_bench.model, bench.adapter, "SD3 (2 attentions)", "SD15 (16)"),
        (bench.model, full_bench.adapter, "SD1.5 (16 attentions)", "SD3 (2)"),
    ]
    for model, adapter, *words in cases:
        with pytest.raises(ValueError) as caught:
            host_apply.matching_sites(model, adapter)
        message = str(caught.value)
        assert all(word in message for word in words) and "same family" in message and "\n" not in message
    assert slots.SLOTS.keys() == {"attn2", "dit"}
