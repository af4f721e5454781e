"""Compiled as the host's node does it: as many graphs as the bare model, and none for what changes only numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import pytest
import torch
from bench import Bench, Sd3Bench, ThreeWay, assert_same, slots
from comfy_extras.nodes_torch_compile import TorchCompileModel

SCALES = ThreeWay(2.0, 1.5)


class Graphs:
    """A compiler that changes nothing and counts the graphs that it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: list) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    # As on a graphics card: what the host chooses on a processor asks for free memory, which no graph can.
    monkeypatch.setattr(slots.host_attention, "optimized_attention", slots.host_attention.attention_pytorch)
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def compiled(model: Any, graphs: Graphs) -> Any:
    """By the host's node, with our compiler: newer hosts compile without regard to what is in transformer_options."""
    return TorchCompileModel.execute(model, graphs)[0]


@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("masked", [False, True])
def test_as_many_graphs_as_the_bare_model(bench: Bench, graphs: Graphs, scales: Any, masked: bool) -> None:
    mask = torch.ones(1, 64, 64).tril() if masked else None
    model = bench.apply(bench.application(three_way=scales, mask=mask))
    expected = bench.cfg(model)
    bench.cfg(compiled(bench.model, graphs))
    bare = graphs.count
    torch._dynamo.reset()
    graphs.count = 0
    assert torch.equal(bench.denoised(bench.cfg_guider(compiled(model, graphs)), calls=3), expected)
    assert graphs.count == bare == 1


@pytest.mark.parametrize(("name", "masked"), [("sd3", False), ("sd3", True), ("sd35", True)])
def test_sd3_breaks_at_no_more_places_than_the_host_does(
    request: pytest.FixtureRequest, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, name: str, masked: bool
) -> None:
    """Where a slot runs the block, the host's checkpoint inside it is one; a bare replacement has the same."""
    monkeypatch.setattr(mmdit, "optimized_attention", slots.host_attention.attention_pytorch)
    bench: Sd3Bench = request.getfixturevalue(f"{name}_bench")
    mask = torch.ones(1, 64, 64).tril() if masked else None
    model = bench.apply(bench.application(mask=mask))
    expected = bench.cfg(model)
    replaced = bench.model.clone()
    for number in (0, 2):
        replaced.set_model_patch_replace(
            lambda args, extra: extra["original_block"](args), "dit", "double_block", number
        )
    bench.cfg(compiled(replaced, graphs))
    bare = graphs.count
    torch._dynamo.reset()
    graphs.count = 0
    assert_same(bench.denoised(bench.cfg_guider(compiled(model, graphs)), calls=3), expected)
    assert graphs.count <= bare


def halved(q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
    """Another pack's replacement of an attention."""
    return slots.text_attention(q, k, v, extra_options) * 0.5


def test_changes_of_numbers_compile_nothing(bench: Bench, graphs: Graphs) -> None:
    """One graph a structure: without the adapter, with it, with a mask, with two; whatever comes again is known."""
    applied, one, mask = bench.apply, bench.application, torch.ones(1, 64, 64).tril()
    middle = float(bench.model.get_model_object("model_sampling").percent_to_sigma(0.5))
    other = bench.model.clone()
    other.set_model_attn2_replace(halved, "input", 1, 0)
    structures = {
        "bare": [bench.model, bench.model],
        "one": [applied(one()), applied(one(weight=0.3)), applied(one(2)), applied(one(end_percent=0.9))],
        "out of range": [applied(one(end_percent=0.1)), applied(one(2, start_percent=0.9))],
        "masked": [applied(one(mask=mask)), applied(one(mask=1 - mask, weight=0.4))],
        "two": [applied(one(), one(2)), applied(one(3), one(4, start_percent=0.1))],
        "beside another's": [applied(one(), model=other), applied(one(2), model=other)],
    }
    for again in (False, True):  # what was made serves again
        for number, models in enumerate(structures.values(), 1):
            for model in models:
                expected = bench.cfg(model, sigma=middle)
                assert torch.equal(bench.cfg(compiled(model, graphs), sigma=middle), expected)
            assert graphs.count == (len(structures) if again else number)
