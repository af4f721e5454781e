"""Beside the real packs that artists combine with ours, in either order: PACKS_DIR names a folder with their checkouts.

They cannot be had from a package registry, so `make test` does not install them; each pack's kind is built anew in
test_beside_row_patches.py and test_model_patching.py. These say that the kinds are theirs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, ThreeWay, assert_differs, assert_same, core_adapter, core_config, random, tokens
from beside import ORDERS, SCALES, Patch, check, in_order, sampled

FOLDER = os.environ.get("PACKS_DIR", "")
EITHER = [None, ThreeWay(2.0, 1.5)]


def pack(name: str, module: str = "") -> Any:
    """A pack, or one of its modules, as the host would import it."""
    path = Path(FOLDER) / name
    if not FOLDER or not path.is_dir():
        pytest.skip(f"PACKS_DIR names no folder with {name}")
    known = "pack_" + name.replace("-", "_").lower()
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            known, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[known] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    try:
        return importlib.import_module(f"{known}.{module}") if module else sys.modules[known]
    except ImportError as error:
        if not (error.name or "").startswith("comfy."):
            raise
        pytest.skip(f"{name} needs another ComfyUI: {error}")


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    return left, 1 - left


def krita(bench: Bench) -> Patch:
    """Regions of comfyui-tooling-nodes, which Krita's plugin uses."""
    region = pack("comfyui-tooling-nodes", "region")
    left, right = halves()
    regions = region.Region(None, None, bench.text("a red house"))
    for mask, prompt in ((left * 0.9, "a dog"), (right * 0.9, "a boat")):
        regions = region.Region(regions, mask, bench.text(prompt))
    return lambda model: region.AttentionMaskPatch.apply(model, regions)


def ppm(bench: Bench) -> Patch:
    node = pack("ComfyUI-ppm", "src.nodes_ppm.attention_couple_ppm").AttentionCouplePPM
    left, right = halves()
    inputs = {"base_cond": bench.positive, "base_mask": left, "cond_1": bench.text("a boat"), "mask_1": right}
    return lambda model: node.execute(model=model, **inputs)[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("patch", [krita, ppm])
def test_regional_prompts(bench: Bench, patch: Any, scales: Any, order: str) -> None:
    check(bench, order, patch(bench), scales)


@pytest.mark.parametrize("scales", SCALES)
def test_regional_prompts_in_the_prompt(bench: Bench, scales: Any) -> None:
    """comfyui-prompt-control hangs its regions on the positive, as hooks, and not on the model."""
    couple = pack("comfyui-prompt-control", "prompt_control.attention_couple_ppm")
    extra = bench.text("a boat")[0]
    _, right = halves()
    positive = couple.set_cond_attnmask(
        bench.positive, [[extra[0], extra[1] | {"mask": right, "mask_strength": 1.0}]], fill=True
    )
    check(bench, "before", lambda model: model, scales, positive=positive)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scales", SCALES)
def test_negative_words_in_the_prompt(bench: Bench, scales: Any, order: str) -> None:
    """ComfyUI-ppm's NegPip: keys and values of the prompt differ, and come twice as long."""
    node = pack("ComfyUI-ppm", "src.nodes_ppm.clip_negpip").CLIPNegPip
    _, clip = node.execute(model=bench.model, clip=bench.clip)
    lists = {
        name: clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        for name, prompt in (("positive", "a cat (with a hat:-1.2)"), ("negative", "blurry"))
    }
    each = bench.application(three_way=scales)
    model = in_order(bench, order, lambda model: node.execute(model=model, clip=bench.clip)[0], each)
    ours = sampled(bench, model, **lists)
    assert_differs(ours, sampled(bench, bench.apply(each)))
    alone = in_order(bench, "before", lambda model: node.execute(model=model, clip=bench.clip)[0], bench.application())
    if scales == SCALES[0]:
        assert_differs(ours, sampled(bench, alone, **lists))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scales", [None, *SCALES])
def test_context_windows(bench: Bench, scales: Any, order: str) -> None:
    """AnimateDiff-Evolved without a motion model: windows of two of four latents, each with its own picture."""
    gen2 = pack("ComfyUI-AnimateDiff-Evolved", "animatediff.nodes_gen2")
    context = pack("ComfyUI-AnimateDiff-Evolved", "animatediff.nodes_context")
    (windows,) = context.StandardStaticContextOptionsNode().create_options(2, 0, "flat")

    def patch(model: Any) -> Any:
        return gen2.UseEvolvedSamplingNode().use_evolved_sampling(model, "use existing", context_options=windows)[0]

    each = bench.application(tokens=tokens(5, count=4), three_way=scales)
    x = random(4, 4, 8, 8)
    assert_same(sampled(bench, in_order(bench, order, patch, each), x=x), sampled(bench, bench.apply(each), x=x), 1e-4)


@pytest.fixture(scope="module")
def weights(full_bench: Bench) -> dict:
    """An IPAdapter-Plus file of random weights, as that pack's loader returns one."""
    config = core_config.AdapterConfig(
        instruction_width=None, prompt_width=None, layers=tuple((2 * i + 1, 320) for i in range(16))
    )
    torch.manual_seed(1)
    with torch.inference_mode():  # as the host loads files: that pack puts these tensors into modules it made so
        state = core_adapter.Adapter(config).state_dict()
    groups: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in state.items():
        group, _, name = key.partition(".")
        groups[group][name] = tensor
    return groups


def theirs(model: Any, weights: dict, weight: float = 1.0) -> Any:
    node = pack("ComfyUI_IPAdapter_plus").NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]()
    embeds, none = random(1, 257, 1280, seed=7), random(1, 257, 1280, seed=8)
    return node.apply_ipadapter(model, weights, embeds, weight, "linear", 0.0, 1.0, none, None, object(), "V only")[0]


@pytest.mark.parametrize("scales", EITHER)
def test_popular_adapter_in_either_order(full_bench: Bench, weights: dict, scales: Any) -> None:
    each = full_bench.application(three_way=scales)
    x = random(1, 4, 8, 8)
    ours_only = full_bench.apply(each)
    theirs_only = theirs(full_bench.model, weights)
    theirs_first = full_bench.apply(each, model=theirs_only)
    ours_first = theirs(ours_only, weights)
    assert_same(full_bench.cfg(ours_first, x=x), full_bench.cfg(theirs_first, x=x), 1e-4)
    for alone in (ours_only, theirs_only, full_bench.model):
        assert_differs(full_bench.cfg(ours_first, x=x), full_bench.cfg(alone, x=x), 1e-4)


def test_rerun_of_the_popular_adapter_after_ours(full_bench: Bench, weights: dict) -> None:
    x = random(1, 4, 8, 8)
    ours = full_bench.apply(full_bench.application())
    alone = full_bench.cfg(ours, x=x)
    once = full_bench.cfg(theirs(ours, weights), x=x)
    assert torch.equal(full_bench.cfg(theirs(ours, weights), x=x), once)
    assert torch.equal(full_bench.cfg(ours, x=x), alone)
