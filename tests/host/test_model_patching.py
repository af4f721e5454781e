"""What an application does to a MODEL: clones, chains, other packs in the same slots, precision and memory."""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_patcher
import inside
import pytest
import torch
from bench import (
    Bench,
    Row,
    ThreeWay,
    assert_differs,
    assert_same,
    host_apply,
    host_memory,
    random,
    run_module,
    slots,
    tokens,
)
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT

text_module, prepared = (importlib.import_module(f"{inside.PACK}.nodes.host.{name}") for name in ("text", "prepared"))


def shared_copy(value: Any, memo: Any = None) -> Any:
    """How newer hosts copy a model's options: dictionaries and lists anew, everything in them shared."""
    if isinstance(value, dict):
        return {key: shared_copy(each) for key, each in value.items()}
    return [shared_copy(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(params=["as this host does", "shared objects"])
def cloning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which hosts clone a MODEL's options; newer ones share the objects by themselves."""
    if request.param == "shared objects" and hasattr(comfy.model_patcher, "copy"):
        monkeypatch.setattr(comfy.model_patcher, "copy", SimpleNamespace(deepcopy=shared_copy, copy=copy.copy))
    return request.param


def add_follower(model: Any, seed: int, **options: Any) -> Any:
    """What the popular pack's apply does: clone, then hand a callback to whatever sits in each slot."""
    clone = model.clone()
    to = clone.model_options["transformer_options"] = clone.model_options["transformer_options"].copy()
    to["patches_replace"] = to["patches_replace"].copy()
    to["patches_replace"]["attn2"] = to["patches_replace"]["attn2"].copy()

    def follower(out: torch.Tensor, q: Any, k: Any, v: Any, extra_options: dict, strength: float, **_: Any) -> Any:
        return strength * torch.tanh(q) * [1.0, -1.0][extra_options["cond_or_uncond"][0]]

    for slot in to["patches_replace"]["attn2"].values():
        slot.add(follower, strength=float(seed), **options)
    return clone


def attn2(model: Any) -> dict:
    return model.model_options["transformer_options"]["patches_replace"]["attn2"]


def test_rerun_of_every_node_of_a_chain_changes_nothing(bench: Bench, cloning: str) -> None:
    bare = bench.cfg(bench.model)
    first, second = bench.application(1), bench.application(2, three_way=ThreeWay(2.0, 1.0))
    one = bench.apply(first)
    after_one = bench.cfg(one)
    two = bench.apply(second, model=one)
    after_two = bench.cfg(two)
    three = add_follower(two, 1)
    after_three = bench.cfg(three)
    for _ in range(3):
        assert torch.equal(bench.cfg(bench.apply(second, model=one)), after_two)
        assert torch.equal(bench.cfg(add_follower(two, 1)), after_three)
        assert torch.equal(bench.cfg(bench.apply(first)), after_one)
    assert torch.equal(bench.cfg(three), after_three)
    assert torch.equal(bench.cfg(two), after_two)
    assert torch.equal(bench.cfg(one), after_one)
    assert torch.equal(bench.cfg(bench.model), bare)
    for a, b in ((bare, after_one), (after_one, after_two), (after_two, after_three)):
        assert_differs(a, b)


def test_options_of_the_original_are_untouched(bench: Bench, cloning: str) -> None:
    before = repr(bench.model.model_options), dict(bench.model.additional_models), repr(bench.model.wrappers)
    bench.cfg(bench.apply(bench.application(three_way=ThreeWay(2.0, 1.0))))
    assert (repr(bench.model.model_options), dict(bench.model.additional_models), repr(bench.model.wrappers)) == before


def test_clone_copies_no_weights(bench: Bench) -> None:
    model = bench.apply(bench.application(tokens=tokens(1, count=50)))

    def tensor_bytes() -> int:
        gc.collect()
        alive = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())

    before = tensor_bytes()
    clones = [model.clone() for _ in range(10)]
    assert tensor_bytes() == before
    assert (
        len(
            {
                id(bench.adapter.patcher.model),
                *(id(c.additional_models[k][0].model) for c in clones for k in c.additional_models),
            }
        )
        == 1
    )


def test_chain_registers_everything_once(bench: Bench) -> None:
    each = [bench.application(i, three_way=ThreeWay(2.0, 1.0)) for i in range(3)]
    model = bench.apply(*each)
    assert [len(v) for kind in model.wrappers.values() for v in kind.values()] == [1, 1, 1]
    assert len(model.model_options["sampler_post_cfg_function"]) == 1
    assert [len(models) for models in model.additional_models.values()] == [1]
    assert all(slot.places == (0, 1, 2) and slot.previous is None for slot in attn2(model).values())


def test_every_cross_attention_fires(full_bench: Bench) -> None:
    """Each of SD1.5's sixteen slots alone changes the picture; the middle block's too."""
    x = random(1, 4, 16, 16)
    bare = full_bench.cfg(full_bench.model, x=x)
    patched = full_bench.apply(full_bench.application())
    keys = list(attn2(patched))
    assert keys == [("input", i) for i in (1, 2, 4, 5, 7, 8)] + [("output", i) for i in range(3, 12)] + [("middle", 0)]
    for key in keys:
        only = patched.clone()
        replacements = only.model_options["transformer_options"]["patches_replace"]["attn2"]
        for other in [k for k in keys if k != key]:
            del replacements[other]
        assert_differs(full_bench.cfg(only, x=x), bare, 1e-5)


def test_another_pack_before_ours_is_wrapped(bench: Bench, cloning: str) -> None:
    """What sat in the slot still runs, once, and our picture is added to it."""
    calls = []

    def theirs(q: Any, k: Any, v: Any, extra_options: dict) -> torch.Tensor:
        calls.append(tuple(extra_options["cond_or_uncond"]))
        return slots.text_attention(q, k, v, extra_options) + 0.1 * torch.tanh(q)

    model = bench.model.clone()
    for key in [("input", 1), ("output", 0), ("output", 1)]:
        model.set_model_attn2_replace(theirs, *key)
    only_theirs = bench.cfg(model)
    each = bench.application()
    calls.clear()
    both = bench.cfg(bench.apply(each, model=model))
    assert len(calls) == 3
    for other in (only_theirs, bench.cfg(bench.apply(each)), bench.cfg(bench.model)):
        assert_differs(both, other)
    assert torch.equal(bench.cfg(model), only_theirs)
    # At weight zero ours adds nothing to theirs.
    assert torch.equal(bench.cfg(bench.apply(bench.application(weight=0.0), model=model)), only_theirs)


def test_a_layer_key_of_another_pack_is_found(bench: Bench) -> None:
    """The host looks up (block, id, index) before (block, id); ours goes where it is seen."""

    def theirs(q: Any, k: Any, v: Any, extra_options: dict) -> torch.Tensor:
        return slots.text_attention(q, k, v, extra_options) + 0.1 * torch.tanh(q)

    model = bench.model.clone()
    model.set_model_attn2_replace(theirs, "input", 1, 0)
    assert_differs(bench.cfg(bench.apply(bench.application(), model=model)), bench.cfg(model))
    assert ("input", 1, 0) in attn2(bench.apply(bench.application(), model=model))
    assert ("input", 1) not in attn2(bench.apply(bench.application(), model=model))


def test_another_pack_after_ours_keeps_its_meaning_of_rows(bench: Bench) -> None:
    """A callback that knows positive (0) and negative (1) only, beside three-way rows: no index beyond, and its
    effect on a row is the text scale's."""
    seen = []

    def callback(out: Any, q: Any, k: Any, v: Any, extra_options: dict, **_: Any) -> torch.Tensor:
        seen.append(list(extra_options["cond_or_uncond"]))
        signs = torch.tensor([[1.0, 0.0][i] for i in extra_options["cond_or_uncond"]])
        return 0.1 * torch.tanh(q) * signs.repeat_interleave(len(q) // len(signs)).view(-1, 1, 1)

    model = bench.apply(bench.application(three_way=ThreeWay(2.0, 1.5))).clone()
    for slot in attn2(model).values():
        slot.add(callback, sigma_start=1e9, sigma_end=0.0)
    assert torch.isfinite(bench.cfg(model)).all()
    assert sorted(seen[0]) == [0, 0, 1, 1]


def test_follower_respects_its_own_range(bench: Bench) -> None:
    model = bench.apply(bench.application())
    off = add_follower(model, 1, sigma_start=1.0, sigma_end=0.0)
    on = add_follower(model, 1, sigma_start=5.0, sigma_end=0.0)
    assert torch.equal(bench.cfg(off, sigma=3.0), bench.cfg(model, sigma=3.0))
    assert_differs(bench.cfg(on, sigma=3.0), bench.cfg(model, sigma=3.0))


def test_a_pack_that_takes_slots_over_is_told_to_go_first(bench: Bench) -> None:
    slot = next(iter(attn2(bench.apply(bench.application())).values()))
    with pytest.raises(ValueError, match="apply that pack first"):
        slot.set_new_condition(1.0, None)


@pytest.mark.parametrize("what", [torch.float8_e4m3fn, torch.float16, torch.device("cpu"), "cpu"])
def test_slots_ignore_casts(bench: Bench, what: Any) -> None:
    model = bench.apply(bench.application())
    before = bench.cfg(model)
    model.model_patches_to(what)
    assert torch.equal(bench.cfg(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapter_on_a_float_model(bench: Bench, dtype: torch.dtype, tiny_models: Path) -> None:
    other = Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)
    other.adapter.adapter.to(dtype)
    each = other.application()
    assert_same(other.cfg(other.apply(each)), bench.cfg(bench.apply(bench.application())), 2e-2)


def test_fp8_model(tiny_models: Path) -> None:
    """UNet weights in fp8, computing in float32: what `Load Diffusion Model` does with fp8_e4m3fn."""
    import comfy.sd

    path = str(tiny_models / "checkpoints" / MIN_CHECKPOINT)
    other = Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)
    other.model = comfy.sd.load_checkpoint_guess_config(
        path, output_clip=False, output_vae=False, model_options={"dtype": torch.float8_e4m3fn}
    )[0]
    assert next(other.model.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn
    ours = other.cfg(other.apply(other.application()))
    assert torch.isfinite(ours).all()
    assert_differs(ours, other.cfg(other.model))


def test_alternative_attention_backend_is_not_asked_for_sixteen_keys(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that returns rubbish for 16 keys: the text's attention goes through it, ours does not."""
    original = slots.host_attention.optimized_attention
    lengths = []

    def picky(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(k.shape[1])
        out = original(q, k, v, *args, **kwargs)
        return out * float("nan") if k.shape[1] == 16 else out

    monkeypatch.setattr(slots.host_attention, "optimized_attention", picky)
    assert torch.isfinite(bench.cfg(bench.apply(bench.application()), x=random(1, 4, 16, 16))).all()
    assert 77 in lengths
    assert 16 not in lengths


def test_weights_are_the_hosts_to_manage(bench: Bench) -> None:
    """Sampling loads the adapter beside the model, and the host can put it away and bring it back."""
    import comfy.model_management as management

    management.unload_all_models()
    model = bench.apply(bench.application())
    before = bench.cfg(model)
    loaded = [m.model.model for m in management.current_loaded_models if m.model is not None]
    assert any(module is bench.adapter.adapter for module in loaded)
    management.unload_all_models()
    assert torch.equal(bench.cfg(model), before)


def test_run_state_is_dropped_with_the_run(bench: Bench) -> None:
    bench.cfg(bench.apply(bench.application()))
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, (run_module.SamplingRun, run_module.ModelCall))]


@pytest.mark.parametrize(
    ("size", "mask_shape"),
    [((8, 8), (64, 64)), ((8, 24), (1, 1)), ((9, 7), (3, 500)), ((17, 20), (700, 20)), ((8, 33), (64, 64))],
)
def test_masks_of_any_shape_on_any_picture(full_bench: Bench, size: tuple, mask_shape: tuple) -> None:
    x = random(1, 4, *size)
    white = full_bench.application(mask=torch.ones(1, *mask_shape))
    black = full_bench.application(mask=torch.zeros(1, *mask_shape))
    assert_same(
        full_bench.cfg(full_bench.apply(white), x=x),
        full_bench.cfg(full_bench.apply(full_bench.application()), x=x),
        1e-4,
    )
    assert torch.equal(full_bench.cfg(full_bench.apply(black), x=x), full_bench.cfg(full_bench.model, x=x))


def test_mask_keeps_the_adapter_to_its_half(bench: Bench) -> None:
    """Far from the mask the picture is the bare model's: the tiny UNet sees a few pixels around each."""
    mask = torch.zeros(1, 128, 512)
    mask[..., :256] = 1
    x = random(1, 4, 16, 64)
    ours = bench.cfg(bench.apply(bench.application(mask=mask)), x=x)
    bare, everywhere = bench.cfg(bench.model, x=x), bench.cfg(bench.apply(bench.application()), x=x)
    near_left = (ours - everywhere)[..., :24].abs().mean() / (everywhere - bare)[..., :24].abs().mean()
    near_right = (ours - bare)[..., 40:].abs().mean() / (everywhere - bare)[..., 40:].abs().mean()
    assert near_left < 0.5
    assert near_right < 0.5


def test_mask_batch_goes_with_the_latents(bench: Bench) -> None:
    masks = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])
    x = random(1, 4, 8, 8).repeat(2, 1, 1, 1)
    ours = bench.cfg(bench.apply(bench.application(mask=masks)), x=x)
    assert_same(ours[:1], bench.cfg(bench.apply(bench.application()), x=x)[:1], 1e-4)
    assert_same(ours[1:], bench.cfg(bench.model, x=x)[1:], 1e-4)


def test_adapter_and_model_of_different_families(bench: Bench, full_bench: Bench) -> None:
    with pytest.raises(ValueError, match="same family"):
        host_apply.matching_sites(full_bench.model, bench.adapter)
    not_a_unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2), model_config=object()))
    with pytest.raises(ValueError, match="same family"):
        host_apply.matching_sites(not_a_unet, bench.adapter)


def test_keys_and_values_follow_the_queries_device_and_precision(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several cards the same slot is asked from each; here the second device is torch's "meta"."""
    model = bench.apply(bench.application(mask=torch.ones(1, 64, 64)))
    calls = []
    for key, slot in attn2(model).items():
        attn2(model)[key] = lambda *qkv, slot=slot: (calls.append((slot, qkv[3])), slot(*qkv))[1]
    bench.cfg(model)
    slot, extra = calls[0]
    for device, dtype in (("meta", torch.float16), ("cpu", torch.bfloat16), ("cpu", torch.float32)):
        q = torch.empty(2, 64, 320, device=device, dtype=dtype)
        text = torch.empty(2, 77, 320, device=device, dtype=dtype)
        monkeypatch.setattr(slots, "text_attention", lambda q, k, v, extra: torch.zeros_like(q))
        out = slot(q, text, text, extra)
        assert (out.device.type, out.dtype) == (device, dtype)


def test_keys_and_values_are_made_where_the_model_computes(bench: Bench) -> None:
    """Prepared before the model is entered, so that no layer of no step moves them."""
    model, seen = bench.apply(bench.application()), []
    for key, slot in attn2(model).items():
        attn2(model)[key] = lambda *qkv, slot=slot: (seen.append((qkv[0], qkv[3])), slot(*qkv))[1]
    bench.cfg(model)
    for q, extra in seen:
        for acting in extra[slots.CALL].acting:
            pairs = acting.key_values
            assert all((t.device, t.dtype, len(t)) == (q.device, q.dtype, len(q)) for pair in pairs for t in pair)


@pytest.mark.parametrize("scales", [None, ThreeWay(2.0, 1.5)])
def test_weights_stay_where_the_host_splits_a_model_among_cards(bench: Bench, scales: Any) -> None:
    """Newer hosts ask each additional model for a copy on the second device, and put it in the first one's place."""
    model = bench.apply(bench.application(three_way=scales))
    expected = bench.cfg(model)
    for order in ("after", "before"):
        split = model.clone() if order == "after" else bench.model.clone()
        for key, patchers in split.additional_models.items():
            split.additional_models[key] = [
                p.deepclone_multigpu(new_load_device=torch.device("cpu:0")) for p in patchers
            ]
        split = split if order == "after" else bench.apply(bench.application(three_way=scales), model=split)
        (copied,) = split.get_additional_models()
        assert copied.model is bench.adapter.adapter
        assert copied.load_device == bench.adapter.patcher.load_device
        assert torch.equal(bench.cfg(split), expected)


def test_keys_and_values_are_made_before_the_first_evaluation(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that split a model among cards evaluate in a thread for each."""
    order: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (order.append(name), function(*args, **kwargs))[1]

    monkeypatch.setattr(run_module, "prepare", recorded("prepared", run_module.prepare))
    model = bench.apply(bench.application()).clone()
    model.add_wrapper_with_key(
        "calc_cond_batch", "test", recorded("evaluated", lambda executor, *args: executor(*args))
    )
    bench.cfg(model, calls=2)
    assert order == ["prepared", "evaluated", "evaluated"]


def test_work_outside_the_model_is_done_on_the_card_of_its_weights(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer hosts stream weights, and wait for them on the card that is the current one."""
    sd3 = request.getfixturevalue("sd3_bench")
    entered: list[torch.device] = []

    @contextmanager
    def context(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(host_memory.management, "cuda_device_context", context, raising=False)
    monkeypatch.setattr(sd3.clip.patcher, "load_device", torch.device("cpu:0"))
    text_module.encode_text(sd3.clip, "a cat", sd3.adapter.config, literal=True)
    assert entered == [torch.device("cpu:0")]
    entered.clear()
    # The adapter's own layers, and the model's embedding of its tokens.
    prepared.prepare(sd3.adapter, {Row.FULL: sd3.application().tokens[Row.FULL]}, sd3.model, 1.0)
    assert entered == [sd3.adapter.patcher.load_device, sd3.model.load_device]
