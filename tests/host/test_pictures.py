"""Pictures through the real server, from the loader to the PNG: what a user would see, held to pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ipadapter_instruct_core import checkpoint
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, InstructionEncoder
from ipadapter_instruct_core.encoders import OpenClip
from pictures import CLEARLY, adapted, distance, one
from safetensors.torch import save_file
from tools.host.graphs import node, rewired, text_to_image, with_controlnet, with_lora
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, MIN_PAPER_ADAPTER, TINY_NAMES

FULL_CHECKPOINT = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
FULL_ADAPTER = TINY_NAMES["ip-adapter-instruct-sd15.bin"]


@pytest.fixture(scope="module")
def bare(server: ComfyServer) -> np.ndarray:
    return one(server, text_to_image(MIN_CHECKPOINT))


def test_adapter_changes_the_picture_and_weight_zero_does_not(
    server: ComfyServer, reference_picture: str, bare: np.ndarray
) -> None:
    graph = text_to_image(MIN_CHECKPOINT)
    assert distance(one(server, adapted(graph, reference_picture)), bare) > CLEARLY
    np.testing.assert_array_equal(one(server, adapted(graph, reference_picture, weight=0.0)), bare)


def test_every_task_makes_its_own_picture(server: ComfyServer, reference_picture: str) -> None:
    tasks = ["everything", "style", "composition", "object", "face"]
    graph = text_to_image(MIN_CHECKPOINT)
    pictures = [one(server, adapted(graph, reference_picture, task=task, guidance="simple")) for task in tasks]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert distance(first, second) > CLEARLY / 2


def test_own_wording_and_subject_are_read(server: ComfyServer, reference_picture: str) -> None:
    graph = text_to_image(MIN_CHECKPOINT)

    def picture(**settings: Any) -> np.ndarray:
        return one(server, adapted(graph, reference_picture, task="object", **settings))

    plain, wording, subject = picture(), picture(instruction="take the light"), picture(subject="teapot")
    assert min(distance(plain, wording), distance(plain, subject), distance(wording, subject)) > CLEARLY / 4
    np.testing.assert_array_equal(picture(instruction="use the object", subject="teapot"), subject)


def test_brackets_in_a_wording_are_literal_and_in_a_prompt_are_emphasis(
    server: ComfyServer, reference_picture: str
) -> None:
    graph = text_to_image(MIN_CHECKPOINT)

    def picture(**settings: Any) -> np.ndarray:
        return one(server, adapted(graph, reference_picture, **settings))

    assert distance(picture(instruction="use the (style)"), picture(instruction="use the style")) > 0
    np.testing.assert_array_equal(picture(prompt="a (cat:1.2)"), picture(prompt="a cat"))


def test_rerun_of_every_node_gives_the_same_pixels(server: ComfyServer, reference_picture: str) -> None:
    graph = adapted(text_to_image(MIN_CHECKPOINT), reference_picture, task="object")
    first = one(server, graph)
    one(server, {**graph, "apply": rewired(graph["apply"], weight=0.5)})
    one(server, {**graph, "sampler": rewired(graph["sampler"], seed=99)})
    np.testing.assert_array_equal(one(server, graph), first)
    server.post("/free", {"unload_models": True, "free_memory": True})
    np.testing.assert_array_equal(one(server, graph), first)


def test_beside_controlnet_and_lora(server: ComfyServer, reference_picture: str) -> None:
    plain = text_to_image(FULL_CHECKPOINT)
    controlnet = TINY_NAMES["control_v11p_sd15_scribble_fp16.safetensors"]
    lora = TINY_NAMES["pixel_art_style_sd15.safetensors"]
    both = with_controlnet(with_lora(plain, lora), controlnet, reference_picture)
    pictures = [
        one(server, graph)
        for graph in (
            both,
            adapted(both, reference_picture, FULL_ADAPTER, task="composition"),
            adapted(with_lora(plain, lora), reference_picture, FULL_ADAPTER, task="composition"),
            adapted(with_controlnet(plain, controlnet, reference_picture), reference_picture, FULL_ADAPTER),
        )
    ]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert distance(first, second) > CLEARLY / 2


def test_our_guider_in_sampler_custom_advanced(server: ComfyServer, reference_picture: str) -> None:
    """The same scales by Apply in KSampler and by our guider give the same picture."""
    graph = adapted(
        text_to_image(MIN_CHECKPOINT, cfg=5.0),
        reference_picture,
        guidance="three-way",
        instruct_scale=3.0,
        image_scale=0.5,
    )
    by_apply = one(server, graph)
    custom = {key: value for key, value in graph.items() if key != "sampler"}
    custom["apply"] = rewired(graph["apply"], guidance="simple")
    custom |= {
        "noise": node("RandomNoise", noise_seed=1),
        "method": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["apply", 0], scheduler="normal", steps=2, denoise=1.0),
        "guider": node(
            "IPAdapterInstructGuider",
            model=["apply", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            cfg=5.0,
            instruct_scale=3.0,
            image_scale=0.5,
        ),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["method", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }
    np.testing.assert_allclose(one(server, custom), by_apply, atol=1 / 255)


def test_several_pictures(server: ComfyServer, reference_picture: str) -> None:
    """One for each latent of the batch: each latent's picture is the one that its own reference gives alone."""
    graph = adapted(text_to_image(MIN_CHECKPOINT, batch=2), reference_picture, combine_images="one for each batch item")
    graph["flipped"] = node("ImageInvert", image=["reference", 0])
    graph["pair"] = node("ImageBatch", image1=["reference", 0], image2=["flipped", 0])
    pair = server.run({**graph, "apply": rewired(graph["apply"], image=["pair", 0])})
    first = server.run(graph)
    second = server.run({**graph, "apply": rewired(graph["apply"], image=["flipped", 0])})
    np.testing.assert_allclose(pair[0], first[0], atol=2 / 255)
    np.testing.assert_allclose(pair[1], second[1], atol=2 / 255)
    assert distance(first[0], second[0]) > CLEARLY / 2
    single = {**graph, "latent": rewired(graph["latent"], batch_size=1)}
    combined = [
        one(server, {**single, "apply": rewired(graph["apply"], image=["pair", 0], combine_images=how)})
        for how in ("concatenate", "average")
    ]
    assert distance(*combined) > 0


def test_converted_file_gives_the_same_picture(server: ComfyServer, reference_picture: str) -> None:
    folder = server.models / "ipadapter_instruct"
    state, _ = checkpoint.read(folder / MIN_ADAPTER)
    checkpoint.write(folder / "converted.safetensors", state, {})
    graph = text_to_image(MIN_CHECKPOINT)
    original, converted = (
        one(server, adapted(graph, reference_picture, name)) for name in (MIN_ADAPTER, "converted.safetensors")
    )
    np.testing.assert_array_equal(original, converted)
    shared = server.models / "ipadapter"
    shared.mkdir(exist_ok=True)
    (shared / "from_the_shared_folder.safetensors").write_bytes((folder / "converted.safetensors").read_bytes())
    (shared / "not_an_adapter.safetensors").write_bytes(b"no weights")
    names = server.object_info()["IPAdapterInstructModelLoader"]["input"]["required"]["adapter_name"]
    assert "from_the_shared_folder.safetensors" in str(names)
    assert "not_an_adapter" not in str(names)
    np.testing.assert_array_equal(
        one(server, adapted(graph, reference_picture, "from_the_shared_folder.safetensors")), converted
    )


def test_the_papers_projector_ignores_the_prompt(server: ComfyServer, reference_picture: str) -> None:
    graph = text_to_image(MIN_CHECKPOINT)

    def picture(adapter: str, prompt: str) -> np.ndarray:
        return one(server, adapted(graph, reference_picture, adapter, prompt=prompt))

    np.testing.assert_array_equal(picture(MIN_PAPER_ADAPTER, "a cat"), picture(MIN_PAPER_ADAPTER, "a blue house"))
    assert distance(picture(MIN_ADAPTER, "a cat"), picture(MIN_ADAPTER, "a blue house")) > 0


OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2},
}


def write_open_clip_pair(models: Path) -> tuple[str, str]:
    """A small OpenCLIP model with its config beside it, and an adapter that reads both of its towers."""
    torch.manual_seed(0)
    name, adapter_name = "small_open_clip.safetensors", "reads_open_clip.safetensors"
    model = OpenClip(OPEN_CLIP)
    save_file(dict(model.clip.state_dict()), models / "clip_vision" / name)
    (models / "clip_vision" / name).with_suffix(".json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    config = AdapterConfig(
        image_width=64,
        width=128,
        heads=2,
        instruction_width=48,
        prompt_width=None,
        layers=tuple((n, 320) for n in (1, 3, 5)),
        instruction_encoder=InstructionEncoder.OPEN_CLIP,
    )
    checkpoint.save(models / "ipadapter_instruct" / adapter_name, Adapter(config))
    return name, adapter_name


def test_open_clip_serves_for_both_towers(server: ComfyServer, reference_picture: str, bare: np.ndarray) -> None:
    name, adapter_name = write_open_clip_pair(server.models)
    graph = text_to_image(MIN_CHECKPOINT)

    def picture(task: str) -> np.ndarray:
        ours = adapted(graph, reference_picture, adapter_name, task=task, guidance="simple")
        del ours["vision"]
        ours["open_clip"] = node("IPAdapterInstructOpenCLIPLoader", model_name=name)
        ours["instruction"] = rewired(ours["instruction"], clip=["open_clip", 0])
        ours["apply"] = rewired(ours["apply"], clip_vision=["open_clip", 0])
        return one(server, ours)

    style, face = picture("style"), picture("face")
    assert distance(style, bare) > CLEARLY
    assert distance(style, face) > 0


def test_a_file_replaced_under_its_name_is_loaded_anew(server: ComfyServer, reference_picture: str) -> None:
    path = server.models / "ipadapter_instruct" / "replaced.safetensors"
    state, _ = checkpoint.read(path.with_name(MIN_ADAPTER))
    checkpoint.write(path, state, {})
    graph = adapted(text_to_image(MIN_CHECKPOINT), reference_picture, path.name)
    first = one(server, graph)
    checkpoint.write(path, {key: value * 0.5 for key, value in state.items()}, {})
    assert distance(one(server, graph), first) > CLEARLY / 4
