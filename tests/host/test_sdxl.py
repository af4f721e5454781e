"""SDXL's seventy cross-attentions, on the host's own model class with few channels."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from bench import (
    CFG,
    Bench,
    Row,
    ThreeWay,
    assert_differs,
    assert_same,
    core_adapter,
    core_config,
    guidance,
    host_memory,
    random,
    sites,
)

# FACTS of the released file: the cross-attentions in key order (1, 3, ... 139).
KEYS = [
    *[("input", block, i) for block in (4, 5) for i in range(2)],
    *[("input", block, i) for block in (7, 8) for i in range(10)],
    *[("output", block, i) for block in (0, 1, 2) for i in range(10)],
    *[("output", block, i) for block in (3, 4, 5) for i in range(2)],
    *[("middle", 0, i) for i in range(10)],
]
CHANNELS = 32


def sdxl_model() -> Any:
    config = comfy.supported_models.SDXL(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": CHANNELS,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "context_dim": 2048,
            "num_head_channels": 16,
            "use_linear_in_transformer": True,
            "use_spatial_transformer": True,
            "legacy": False,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SDXL(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        drawn = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(drawn if parameter.ndim > 1 else 1 + 0.1 * drawn)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class SdxlBench(Bench):
    def __init__(self) -> None:
        self.model = sdxl_model()
        found = sites.sites(self.model.model.diffusion_model)
        config = core_config.AdapterConfig(
            width=64,
            heads=1,
            output_width=2048,
            base=core_config.Base.SDXL,
            layers=tuple((2 * i + 1, slot.width) for i, slot in enumerate(found)),
        )
        torch.manual_seed(0)
        adapter = core_adapter.Adapter(config).eval()
        patcher = comfy.model_patcher.ModelPatcher(adapter, torch.device("cpu"), torch.device("cpu"))
        self.adapter = host_memory.HostedAdapter("sdxl", adapter, patcher)
        self.positive, self.negative = (_text(seed) for seed in (1, 2))


def _text(seed: int) -> list:
    return [[random(1, 77, 2048, seed=seed), {"pooled_output": 3 * random(1, 1280, seed=seed + 10)}]]


@pytest.fixture(scope="module")
def bench() -> SdxlBench:
    with torch.inference_mode():
        return SdxlBench()


def test_slots_are_those_of_the_released_file(bench: SdxlBench) -> None:
    found = sites.sites(bench.model.model.diffusion_model)
    assert [slot.key({}) for slot in found] == KEYS


def test_every_layer_fires(bench: SdxlBench) -> None:
    each = bench.application()
    calls = []
    model = bench.apply(each)
    options = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    for key, slot in options.items():
        options[key] = lambda q, k, v, extra, slot=slot: (calls.append(slot.layer), slot(q, k, v, extra))[1]
    assert_differs(bench.cfg(model), bench.cfg(bench.model))
    assert sorted(calls) == list(range(70))


def test_simple_guidance(bench: SdxlBench) -> None:
    each = bench.application()
    full = bench.predict(bench.positive, {each: Row.FULL})
    uncond = bench.predict(bench.negative, {each: Row.UNCOND})
    assert_same(bench.cfg(bench.apply(each)), uncond + CFG * (full - uncond), 1e-4)


def test_added_rows_keep_the_positive_pooled_vector(bench: SdxlBench) -> None:
    scales = ThreeWay(4.0, 0.5)
    each = bench.application(three_way=scales)
    with_positive_pooled = [[bench.negative[0][0], bench.positive[0][1]]]
    rows = {
        Row.FULL: bench.predict(bench.positive, {each: Row.FULL}),
        Row.EVERYTHING: bench.predict(with_positive_pooled, {each: Row.EVERYTHING}),
        Row.IMAGE: bench.predict(with_positive_pooled, {each: Row.IMAGE}),
        Row.UNCOND: bench.predict(bench.negative, {each: Row.UNCOND}),
    }
    assert_same(bench.cfg(bench.apply(each)), guidance.three_way(rows, CFG, 4.0, 0.5), 1e-4)
    assert_differs(rows[Row.IMAGE], bench.predict(bench.negative, {each: Row.IMAGE}))


def test_added_rows_take_the_pooled_vector_of_the_positive_in_force(bench: SdxlBench) -> None:
    """Positives scheduled over ranges of steps, as ConditioningSetTimestepRange does."""
    scales = ThreeWay(4.0, 0.5)
    each = bench.application(three_way=scales)
    later = _text(3)
    parts = ((bench.positive, 0.0, 0.5), (later, 0.5, 1.0))
    scheduled = [[c, {**o, "start_percent": start, "end_percent": end}] for text, start, end in parts for c, o in text]
    sampling = bench.model.get_model_object("model_sampling")
    for positive, percent in ((bench.positive, 0.25), (later, 0.75)):
        sigma = float(sampling.percent_to_sigma(percent))
        pooled = [[bench.negative[0][0], positive[0][1]]]
        texts = {Row.FULL: positive, Row.EVERYTHING: pooled, Row.IMAGE: pooled, Row.UNCOND: bench.negative}
        rows = {row: bench.predict(text, {each: row}, sigma=sigma) for row, text in texts.items()}
        ours = bench.cfg(bench.apply(each), positive=scheduled, sigma=sigma)
        assert_same(ours, guidance.three_way(rows, CFG, 4.0, 0.5), 1e-4)
