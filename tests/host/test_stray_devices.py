"""The nodes and a sampling step on a card that is not there: a tensor on the wrong device fails on any machine.

The host is told of the card and of its memory, and moves, offloads and casts weights itself.
"""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.ldm.modules.attention as host_attention
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_management as management
import comfy.samplers
import numpy as np
import pytest
import torch
from absent_card import CARD, CPU, Card, card
from bench import Bench, Row, Sd3Bench, ThreeWay, host_memory, inside, random
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, SD35_ADAPTER, SD35_CHECKPOINT, TINY_NAMES

__all__ = ["card"]

references = importlib.import_module(f"{inside.PACK}.nodes.encode_reference")
encode_node = importlib.import_module(f"{inside.PACK}.nodes.encode_instruction")
ROOM = {"weights on the card": (2**40, CARD), "weights offloaded": (2**30, CPU)}  # the host keeps that much free
HALF = torch.ones(1, 8, 8).tril()
SD3 = (TINY_NAMES["sd3_medium_incl_clips_t5xxlfp8.safetensors"], TINY_NAMES["ip-adapter-instruct-sd3.bin"])
SD35 = (SD35_CHECKPOINT, SD35_ADAPTER)


@pytest.fixture(scope="module", params=ROOM)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the host keeps weights, by the card's memory: on it, or on the CPU, to be cast where they are used."""
    free, kept = ROOM[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "get_torch_device", lambda: CARD)
        patch.setattr(management, "text_encoder_device", lambda: CARD)
        patch.setattr(
            management, "get_free_memory", lambda _=None, torch_free_too=False: (free,) * 2 if torch_free_too else free
        )
        patch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
        patch.setattr(management, "current_loaded_models", [])
        patch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)
        # A picture's hash is made of its bytes, which no fake picture has.
        patch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tuple(tensor.shape), np.float32))
        yield kept


@pytest.fixture(autouse=True)
def _no_model_is_collected_while_another_is_loaded() -> Iterator[None]:
    """The host tells of one that it unloads, and hosts of this year trip where that is gone by then."""
    yield
    gc.collect()


class DrawnTexts(Bench):
    """A bench that reads no prompts, for which models would be moved."""

    def text(self, prompt: str) -> list:
        return [[random(1, 77, 768), {}]]


@pytest.fixture(scope="module")
def bench(place: torch.device, tiny_models: Path) -> Bench:
    return DrawnTexts(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)


def sample(guider: Any, items: int) -> torch.Tensor:
    """One step of the host's own sampling."""
    noise = random(items, 4, 8, 8)
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([3.0, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"three_way": ThreeWay(4.0, 0.5)},
        {"mask": HALF},
        {"end_percent": 0.5},
        {"tokens": {row: random(2, 16, 768) for row in Row}},
    ],
    ids=["simple", "three-way", "mask", "range", "a picture each"],
)
def test_a_step_of_the_patched_unet(bench: Bench, card: Card, place: torch.device, settings: dict[str, Any]) -> None:
    with card:
        latents = sample(bench.cfg_guider(bench.apply(bench.application(**settings))), 2)
    assert (latents.device, latents.shape) == (CARD, (2, 4, 8, 8))
    assert devices(bench.model.model.diffusion_model) == devices(bench.adapter.adapter) == {place}


class DrawnSd3Texts(Sd3Bench):
    def text(self, prompt: str) -> list:
        return [[random(1, 77, 4096), {"pooled_output": random(1, 2048)}]]


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (SD3, {}),
        (SD3, {"three_way": ThreeWay(2.0, 1.5)}),
        (SD3, {"mask": HALF}),
        (SD3, {"tokens": {row: random(1, 32, 4096) for row in Row}}),
        (SD35, {"mask": HALF}),
    ],
    ids=["simple", "three-way", "mask", "two pictures", "SD3.5"],
)
def test_a_step_of_the_patched_sd3(
    place: torch.device,
    card: Card,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
    settings: dict[str, Any],
) -> None:
    """Its layers are asked at every step, so they are cast or moved as the host's own are."""
    monkeypatch.setattr(mmdit, "optimized_attention", host_attention.attention_pytorch)
    bench = DrawnSd3Texts(tiny_models, *names)
    noise = random(2, 16, 8, 8)
    with card:
        guider = bench.cfg_guider(bench.apply(bench.application(**settings)))
        euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([0.7, 0.0])
        latents = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
    assert (latents.device, latents.shape) == (CARD, noise.shape)
    assert devices(bench.adapter.adapter) == {place}


def test_a_step_of_two_adapters_in_an_area(bench: Bench, card: Card) -> None:
    area = [[bench.positive[0][0], {**bench.positive[0][1], "area": (4, 8, 4, 0), "strength": 1.0}]]
    with card:
        pair = [bench.application(1, mask=HALF), bench.application(2, three_way=ThreeWay(4.0, 0.5), mask=HALF)]
        guider = bench.cfg_guider(bench.apply(*pair), positive=bench.positive + area)
        assert sample(guider, 1).device == CARD


@pytest.fixture(scope="module")
def host_vision(place: torch.device, card: Card, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The host's ViT-H/14, of two layers."""
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_config_h.json").read_text())
    path = tmp_path_factory.mktemp("vision") / "config.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with card:
        return comfy.clip_vision.ClipVisionModel(str(path))


@pytest.fixture(scope="module")
def open_clip(place: torch.device, tiny_models: Path) -> Any:
    name = TINY_NAMES["open_clip_model.safetensors"]
    return host_memory.load_hosted_open_clip(str(tiny_models / "clip_vision" / name), name)


@pytest.mark.parametrize(
    "encoder, combine", [("host_vision", references.CONCATENATE), ("open_clip", references.AVERAGE)]
)
def test_encode_and_apply(
    bench: Bench, card: Card, tiny_models: Path, encoder: str, combine: str, request: pytest.FixtureRequest
) -> None:
    """Tokens of two pictures, by the host's CLIPs and by an OpenCLIP model, lie where the host keeps small results."""
    vision, text, adapter = request.getfixturevalue(encoder), bench.clip, bench.adapter
    if encoder == "open_clip":
        name = TINY_NAMES["my_adapter.safetensors"]
        adapter = host_memory.load_adapter(str(tiny_models / "ipadapter_instruct" / name), name)
        text = vision
    with card:
        card.products_on_cpu = text is bench.clip  # the host reads texts there where it has little room on the card
        instruction, *_ = encode_node.EncodeInstruction.execute(
            adapter, text, "style", "", "", "a cat", "blurry"
        ).result
        card.products_on_cpu = False
        tokens = references.encode_reference(adapter, instruction, vision, torch.rand(2, 64, 64, 3), combine).tokens
    assert {(each.device, each.dtype) for each in tokens.values()} == {(CPU, torch.float32)}


def devices(model: torch.nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}
