"""SD3 and SD3.5 through the real server, from loader to PNG, held to pixels; and what it says of what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bad_graphs import BAD_GRAPHS
from pictures import CLEARLY, adapted, distance, failure, one
from tools.host.graphs import Graph, node, rewired, text_to_image, with_controlnet
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, SD35_ADAPTER, SD35_CHECKPOINT, TINY_NAMES
from tools.tiny.sd3 import adapter as sd3_adapter

CHECKPOINT = TINY_NAMES["sd3_medium_incl_clips_t5xxlfp8.safetensors"]
ADAPTER = TINY_NAMES["ip-adapter-instruct-sd3.bin"]
CANNY = TINY_NAMES["sd3_controlnet_canny.safetensors"]
BOTH = pytest.mark.parametrize(
    ("checkpoint", "adapter"), [(CHECKPOINT, ADAPTER), (SD35_CHECKPOINT, SD35_ADAPTER)], ids=["sd3", "sd35"]
)


def plain(size: int = 64, checkpoint: str = CHECKPOINT) -> Graph:
    graph = text_to_image(checkpoint, size=size, cfg=6.0)
    return {**graph, "latent": node("EmptySD3LatentImage", width=size, height=size, batch_size=1)}


@pytest.fixture(scope="module")
def bare(server: ComfyServer) -> np.ndarray:
    return one(server, plain())


def test_it_is_listed(server: ComfyServer) -> None:
    options = server.object_info()["IPAdapterInstructModelLoader"]["input"]["required"]["adapter_name"]
    assert ADAPTER in str(options)


@BOTH
def test_it_changes_the_picture_and_weight_zero_does_not(
    server: ComfyServer, reference_picture: str, checkpoint: str, adapter: str
) -> None:
    def picture(**settings: Any) -> np.ndarray:
        return one(server, adapted(plain(checkpoint=checkpoint), reference_picture, adapter, **settings))

    bare, ours = one(server, plain(checkpoint=checkpoint)), picture()
    assert distance(ours, bare) > CLEARLY / 2
    np.testing.assert_array_equal(picture(weight=0.0), bare)
    # The same graph with another between, so that nothing is cached.
    assert distance(picture(task="everything"), ours) > CLEARLY / 8
    np.testing.assert_array_equal(picture(), ours)


def test_instructions_and_prompts_are_read(server: ComfyServer, reference_picture: str) -> None:
    """CLIP-L's instruction of an SD3 checkpoint reaches the tokens."""

    def picture(**settings: Any) -> np.ndarray:
        return one(server, adapted(plain(), reference_picture, ADAPTER, guidance="simple", **settings))

    made = [picture(), picture(task="everything"), picture(instruction="take the light"), picture(prompt="a dog")]
    for i, first in enumerate(made):
        for second in made[:i]:
            assert distance(first, second) > CLEARLY / 8


def test_auto_guides_a_face_three_ways(server: ComfyServer, reference_picture: str) -> None:
    """With SD3's own scales, which differ from SD1.5's."""

    def picture(**settings: Any) -> np.ndarray:
        return one(server, adapted(plain(), reference_picture, ADAPTER, task="face", **settings))

    auto = picture()
    scales = {"guidance": "three-way", "instruct_scale": 6.0, "image_scale": 1.0}
    np.testing.assert_array_equal(auto, picture(**scales))
    assert distance(auto, picture(guidance="simple")) > CLEARLY / 8


def test_a_chain_with_a_controlnet(server: ComfyServer, reference_picture: str, bare: np.ndarray) -> None:
    graph = with_controlnet(plain(), CANNY, reference_picture)
    graph["controlled"]["inputs"]["vae"] = ["checkpoint", 2]
    controlled = one(server, graph)
    first = adapted(graph, reference_picture, ADAPTER)
    both = {
        **first,
        "face": node("IPAdapterInstructEncode", **{**first["instruction"]["inputs"], "task": "composition"}),
        "second": rewired(first["apply"], model=["apply", 0], instruction=["face", 0]),
        "sampler": rewired(first["sampler"], model=["second", 0]),
    }
    pictures = [bare, controlled, one(server, first), one(server, both)]
    for a, b in zip(pictures, pictures[1:], strict=False):
        assert distance(a, b) > CLEARLY / 8


@pytest.mark.parametrize("size", [80, 144])
def test_sizes_that_halve_oddly(server: ComfyServer, reference_picture: str, size: int) -> None:
    one(server, adapted(plain(size), reference_picture, ADAPTER))


# What does not fit.


@pytest.fixture
def the_host_goes_on(server: ComfyServer, bare: np.ndarray) -> Iterator[None]:
    yield
    np.testing.assert_array_equal(one(server, plain()), bare)


FAILS = pytest.mark.usefixtures("the_host_goes_on")


@FAILS
@pytest.mark.parametrize(
    ("checkpoint", "adapter", "words"),
    [
        (MIN_CHECKPOINT, ADAPTER, ("for SD3 (2 attentions)", "SD15")),
        (CHECKPOINT, MIN_ADAPTER, ("for SD1.5 (3 attentions)", "SD3 (2)")),
        (SD35_CHECKPOINT, ADAPTER, ("for SD3 (2 attentions)", "SD3.5 (2)")),
        (CHECKPOINT, SD35_ADAPTER, ("for SD3.5 (2 attentions)", "SD3 (2)")),
    ],
)
def test_base_and_adapter_of_two_families(
    server: ComfyServer, reference_picture: str, checkpoint: str, adapter: str, words: tuple[str, ...]
) -> None:
    message = failure(server, adapted(text_to_image(checkpoint), reference_picture, adapter), "apply")
    assert all(word in message for word in words) and "same family" in message


@FAILS
def test_graphs_that_cannot_go_on(server: ComfyServer, reference_picture: str, models_file: Any) -> None:
    """All that SD1.5's test makes one by one: they end before anything is sampled."""
    for bad in BAD_GRAPHS.values():
        bad.told(server, adapted(plain(), reference_picture, ADAPTER), models_file)


def with_nan(weights: dict) -> dict:
    weights["ip_adapter"]["2.proj_ip.weight"] = torch.full((256, 256), float("nan"))
    return weights


def without(weights: dict, key: str) -> dict:
    del weights["ip_adapter"][key]
    return weights


BAD_FILES = {
    "NaN": (with_nan, "not numbers, in ip_adapter.2.proj_ip.weight"),
    "one lost": (lambda weights: without(weights, "2.add_v_proj_ip.weight"), "2.add_v_proj_ip.weight"),
}


@FAILS
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_file(server: ComfyServer, reference_picture: str, models_file: Any, kind: str) -> None:
    damage, words = BAD_FILES[kind]
    name = models_file("ipadapter_instruct", "bad.bin", damage(sd3_adapter(seed=1)))
    message = failure(server, adapted(plain(), reference_picture, name), "adapter")
    assert words in message and "bad.bin" in message
