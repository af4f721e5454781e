"""Beside the real popular pack, in one chain, in either order: with IPADAPTER_PLUS_DIR naming its folder.

It cannot be had from a package registry, so it is not installed by `make test`; what it relies on (``add`` on the
object in a slot, ``cond_or_uncond`` as an index) is tested without it in test_model_patching.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, ThreeWay, assert_differs, assert_same, core_adapter, core_config, random

FOLDER = os.environ.get("IPADAPTER_PLUS_DIR", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="IPADAPTER_PLUS_DIR names no copy of the popular pack")


@pytest.fixture(scope="module")
def pack() -> Any:
    name = "popular_pack"
    path = Path(FOLDER)
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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


def theirs(pack: Any, model: Any, weights: dict, weight: float = 1.0) -> Any:
    node = pack.NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]()
    embeds, none = random(1, 257, 1280, seed=7), random(1, 257, 1280, seed=8)
    return node.apply_ipadapter(model, weights, embeds, weight, "linear", 0.0, 1.0, none, None, object(), "V only")[0]


@pytest.mark.parametrize("scales", [None, ThreeWay(2.0, 1.5)])
def test_either_order(pack: Any, full_bench: Bench, weights: dict, scales: Any) -> None:
    each = full_bench.application(three_way=scales)
    x = random(1, 4, 8, 8)
    ours_only = full_bench.apply(each)
    theirs_only = theirs(pack, full_bench.model, weights)
    theirs_first = full_bench.apply(each, model=theirs_only)
    ours_first = theirs(pack, ours_only, weights)
    assert_same(full_bench.cfg(ours_first, x=x), full_bench.cfg(theirs_first, x=x), 1e-4)
    for alone in (ours_only, theirs_only, full_bench.model):
        assert_differs(full_bench.cfg(ours_first, x=x), full_bench.cfg(alone, x=x), 1e-4)


def test_rerun_of_theirs_after_ours(pack: Any, full_bench: Bench, weights: dict) -> None:
    x = random(1, 4, 8, 8)
    ours = full_bench.apply(full_bench.application())
    alone = full_bench.cfg(ours, x=x)
    once = full_bench.cfg(theirs(pack, ours, weights), x=x)
    assert torch.equal(full_bench.cfg(theirs(pack, ours, weights), x=x), once)
    assert torch.equal(full_bench.cfg(ours, x=x), alone)
