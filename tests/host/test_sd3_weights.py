"""SD3 and SD3.5: LoRA, ControlNet, precision and memory; models and files of other families."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from bench import (
    Application,
    Row,
    Sd3Bench,
    ThreeWay,
    assert_differs,
    assert_same,
    host_apply,
    host_memory,
    random,
    slots,
)
from tools.tiny.sd3 import WIDTH, controlnet

SCALES = ThreeWay(instruct_scale=2.0, image_scale=1.5)


@pytest.fixture
def bench(flow_bench: Sd3Bench) -> Sd3Bench:
    return flow_bench


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
    weights = bench.state()
    for key, (a, b) in keys.items():
        weights[f"{key}.weight"] = weights[f"{key}.weight"] + 0.5 * b @ a
    merged = bench.loaded(weights)
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


def test_fp8_base(bench: Sd3Bench) -> None:
    """As Load Diffusion Model's fp8: the same as a float model of the rounded weights."""
    state = bench.state()
    fp8 = bench.loaded(dict(state), torch.float8_e4m3fn)
    assert next(fp8.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn
    plain = bench.loaded({key: value.to(torch.float8_e4m3fn).float() for key, value in state.items()})
    each = bench.application()
    fp8.model.manual_cast_dtype = torch.float32  # whatever this machine would choose
    assert_same(bench.cfg(bench.apply(each, model=fp8)), bench.cfg(bench.apply(each, model=plain)), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapter_on_a_float_model(tiny_models: Any, bench: Sd3Bench, dtype: torch.dtype) -> None:
    other = copy.copy(bench)
    other.adapter = host_memory.load_adapter(
        str(tiny_models / "ipadapter_instruct" / bench.adapter.name), bench.adapter.name
    )
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


def test_models_and_adapters_of_other_families_are_named(
    sd3_bench: Sd3Bench, sd35_bench: Sd3Bench, full_bench: Any
) -> None:
    """SD3.5 medium's blocks have SD3's very shapes."""
    sd3, sd35, sd15 = ("SD3", 2, sd3_bench), ("SD3.5", 2, sd35_bench), ("SD1.5", 16, full_bench)
    for one, count, made_for in (sd3, sd35, sd15):
        for other, found, connected in (sd3, sd35, sd15):
            if one == other:
                assert len(host_apply.matching_sites(connected.model, made_for.adapter)) == count
                continue
            with pytest.raises(ValueError) as caught:
                host_apply.matching_sites(connected.model, made_for.adapter)
            assert str(caught.value) == (
                f"{made_for.adapter.name} is an adapter for {one} ({count} attentions), but the connected model is "
                f"{other.replace('SD1.5', 'SD15')} ({found}); choose a checkpoint and an adapter of the same family."
            )
    assert slots.SLOTS.keys() == {"attn2", "dit"}
