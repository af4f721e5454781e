"""DynamicVRAM, with which newer hosts start on most cards, as far as it goes without one: layers whose weights are made
as they are loaded, and MODELs that the host streams. On a CPU it streams nothing; that needs a card.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from bench import Bench, ThreeWay, assert_differs, assert_same, host_memory, sd3_of, simple_guidance
from safetensors.torch import load_file
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT

pytestmark = pytest.mark.skipif(
    not hasattr(comfy.model_patcher, "ModelPatcherDynamic") or importlib.util.find_spec("comfy_aimdo") is None,
    reason="the host knows no such memory",
)
SCALES = ThreeWay(2.0, 1.5)


class NoBuffer:
    """In place of pinned memory, which only cards have."""

    size = 0

    def __init__(self, *_: Any) -> None: ...

    def truncate(self, *_: Any) -> None: ...


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.memory_management
    import comfy_aimdo.host_buffer

    patcher = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_management, "WINDOWS", True)  # where 0.20.1 makes weights late
    monkeypatch.setattr(patcher, "__new__", lambda cls, *_, **__: object.__new__(cls))  # on the CPU, too
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoBuffer)
    monkeypatch.setattr(comfy.utils, "load_safetensors", lambda path: (load_file(path), {}), raising=False)


@pytest.fixture(params=["sd15", "sd3"])
def bench(request: pytest.FixtureRequest, tiny_models: Path, switched_on: None) -> Bench:
    sd15 = request.param == "sd15"
    return Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER, torch.float32) if sd15 else sd3_of(tiny_models)


@pytest.mark.parametrize("delegated", [False, True])
def test_guidance_on_a_model_that_the_host_streams(bench: Bench, delegated: bool) -> None:
    """And on the one that takes its place where something cannot be streamed: under torch.compile, or with hooks."""
    assert bench.model.is_dynamic()
    each = bench.application()
    simple, three_way = bench.apply(each), bench.apply(bench.application(three_way=SCALES))
    if delegated:
        simple, three_way = (model.clone(disable_dynamic=True) for model in (simple, three_way))
        assert not simple.is_dynamic()
    assert_same(bench.cfg(simple), simple_guidance(bench, each), 1e-4)
    assert_differs(bench.cfg(three_way), bench.cfg(simple))


def test_an_adapter_whose_layers_have_no_weights_before_they_are_loaded(
    tiny_models: Path, request: pytest.FixtureRequest
) -> None:
    file = str(tiny_models / "ipadapter_instruct" / MIN_ADAPTER)
    usual = host_memory.load_adapter(file, MIN_ADAPTER)
    request.getfixturevalue("switched_on")
    late = host_memory.load_adapter(file, MIN_ADAPTER)
    assert late.sha256 == usual.sha256
    image, wording, prompt = (torch.rand(1, 9, width) for width in (1280, 768, 768))
    pairs = [one.adapter.key_values(one.adapter.image_proj(image, wording, prompt)) for one in (usual, late)]
    for ours, theirs in zip(*pairs, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
