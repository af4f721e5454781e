"""The test bench itself: a bare ComfyUI makes sound pictures from the tiny models, so that a change means something."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import CLEARLY, distance, one
from tools.host.graphs import node, rewired, text_to_image, with_controlnet, with_lora
from tools.host.server import ComfyError, ComfyServer
from tools.tiny.models import MIN_CHECKPOINT, TINY_NAMES

FULL_CHECKPOINT = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
BOTH = pytest.mark.parametrize("checkpoint", [MIN_CHECKPOINT, FULL_CHECKPOINT])


@BOTH
def test_picture_is_finite_varied_and_in_range(server: ComfyServer, checkpoint: str) -> None:
    image = one(server, text_to_image(checkpoint))
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert 0.05 < image.std() < 0.3
    assert ((image == 0) | (image == 1)).mean() < 0.1, "most pixels must be free to move either way"


@BOTH
def test_seed_prompt_and_steps_change_the_one(server: ComfyServer, checkpoint: str) -> None:
    plain = one(server, text_to_image(checkpoint))
    assert distance(plain, one(server, text_to_image(checkpoint, seed=2))) > CLEARLY
    assert distance(plain, one(server, text_to_image(checkpoint, prompt="a red house"))) > CLEARLY
    assert distance(plain, one(server, text_to_image(checkpoint, negative="sharp"))) > CLEARLY
    assert distance(plain, one(server, text_to_image(checkpoint, steps=4))) > CLEARLY


def test_the_same_graph_gives_the_same_pixels(server: ComfyServer) -> None:
    first = one(server, text_to_image(MIN_CHECKPOINT, seed=11))
    one(server, text_to_image(MIN_CHECKPOINT, seed=12))  # so that the server cannot answer from its cache
    np.testing.assert_array_equal(first, one(server, text_to_image(MIN_CHECKPOINT, seed=11)))


@pytest.mark.parametrize("kind", ["scribble", "openpose"])
def test_controlnet_changes_the_one(server: ComfyServer, reference_picture: str, kind: str) -> None:
    graph = text_to_image(FULL_CHECKPOINT)
    controlnet = TINY_NAMES[f"control_v11p_sd15_{kind}_fp16.safetensors"]
    image = one(server, with_controlnet(graph, controlnet, reference_picture))
    assert np.isfinite(image).all()
    assert distance(image, one(server, graph)) > CLEARLY


def test_lora_changes_the_one(server: ComfyServer) -> None:
    graph = text_to_image(FULL_CHECKPOINT)
    plain, styled = one(server, graph), one(server, with_lora(graph, "pixel_art_style_sd15.safetensors"))
    assert distance(plain, styled) > CLEARLY
    assert "lora key not loaded" not in server.log_text()


def test_clip_vision_file_is_read_as_vit_h(server: ComfyServer, reference_picture: str) -> None:
    """An unCLIP conditioning is the host's own consumer of a CLIP vision output; no SD1.5 sampler reads it."""
    graph = text_to_image(MIN_CHECKPOINT)
    graph["vision"] = node("CLIPVisionLoader", clip_name=TINY_NAMES["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"])
    graph["image"] = node("LoadImage", image=reference_picture)
    graph["encoded"] = node("CLIPVisionEncode", clip_vision=["vision", 0], image=["image", 0], crop="center")
    graph["unclip"] = node(
        "unCLIPConditioning",
        conditioning=["positive", 0],
        clip_vision_output=["encoded", 0],
        strength=1.0,
        noise_augmentation=0.0,
    )
    graph["sampler"] = rewired(graph["sampler"], positive=["unclip", 0])
    assert np.isfinite(one(server, graph)).all()


def test_a_failing_node_is_reported_with_its_own_words(server: ComfyServer) -> None:
    graph = text_to_image(MIN_CHECKPOINT)
    with pytest.raises(ComfyError, match="ckpt_name"):
        server.run({**graph, "checkpoint": node("CheckpointLoaderSimple", ckpt_name="absent.safetensors")})
    broken = server.models / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(ComfyError, match="CheckpointLoaderSimple"):
        server.run({**graph, "checkpoint": node("CheckpointLoaderSimple", ckpt_name=broken.name)})
    broken.unlink()
    assert np.isfinite(one(server, graph)).all()
