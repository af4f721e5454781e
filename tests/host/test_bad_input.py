"""Wrong connections and odd pictures, through the running server: a sentence where it cannot go on, a picture where it
can, and a server that makes the next picture as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from bad_graphs import BAD_GRAPHS
from pictures import CLEARLY, distance, failure, one
from PIL import Image
from tools.host.graphs import Graph, node, rewired, text_to_image
from tools.host.server import ComfyError, ComfyServer
from tools.tiny.adapter_shapes import projector_shapes
from tools.tiny.models import (
    MIN_ADAPTER,
    MIN_CHECKPOINT,
    TINY_NAMES,
    adapter_gain,
    lora,
)
from tools.tiny.shapes import Shapes
from tools.tiny.strided_weights import strided_weights

FULL_CHECKPOINT = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
FAILS = pytest.mark.usefixtures("the_host_goes_on")


def adapted(picture: str, adapter: str = MIN_ADAPTER, **settings: Any) -> Graph:
    """The smallest graph with our nodes, in simple guidance."""
    return pictures.adapted(text_to_image(MIN_CHECKPOINT), picture, adapter, **{"guidance": "simple", **settings})


@pytest.fixture(scope="module")
def plain(server: ComfyServer) -> np.ndarray:
    """The picture without our nodes. Made once, for after a graph without CLIP vision the host forgets the tower."""
    return one(server, text_to_image(MIN_CHECKPOINT))


@pytest.fixture(scope="module")
def healthy(server: ComfyServer, reference_picture: str, plain: np.ndarray) -> np.ndarray:
    return one(server, adapted(reference_picture))


@pytest.fixture
def the_host_goes_on(server: ComfyServer, reference_picture: str, healthy: np.ndarray) -> Iterator[None]:
    """After an error, the very picture that was made before any."""
    yield
    np.testing.assert_array_equal(one(server, adapted(reference_picture)), healthy)


# Bad adapter files, chosen in the loader.


class Code:
    def __init__(self, witness: Path):
        self.witness = str(witness)

    def __reduce__(self) -> tuple:
        return (open, (self.witness, "w"))


def with_nan() -> dict:
    weights = strided_weights(projector_shapes(768), adapter_gain, seed=1)
    weights["latents"] = torch.full((1, 16, 768), float("nan"))
    layers = {f"1.to_{kind}_ip.weight": torch.zeros(1).expand(320, 768) for kind in "kv"}
    return {"image_proj": weights, "ip_adapter": layers}


BAD_FILES = {
    "a web page": (lambda witness: b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "an empty file": (lambda witness: b"", "is empty"),
    "half a file": (lambda witness: b"PK\x03\x04" + bytes(5000), "download it again"),
    "code": (lambda witness: {"image_proj": {}, "ip_adapter": Code(witness)}, "holds code"),
    "a LoRA": (lambda witness: lora(1), "is a LoRA"),
    "NaN": (lambda witness: with_nan(), "not numbers"),
}


@FAILS
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_adapter_file_is_told_by_the_loader(
    server: ComfyServer, reference_picture: str, models_file: Any, tmp_path: Path, kind: str
) -> None:
    content, words = BAD_FILES[kind]
    name = models_file("ipadapter_instruct", "bad.bin", content(tmp_path / "witness"))
    message = failure(server, adapted(reference_picture, adapter=name), "adapter")
    assert words in message and "bad.bin" in message
    assert not (tmp_path / "witness").exists()


@FAILS
def test_a_file_that_is_repaired_on_disk_loads(server: ComfyServer, reference_picture: str, models_file: Any) -> None:
    name = models_file("ipadapter_instruct", "repaired.bin", b"<html>")
    graph = adapted(reference_picture, adapter=name)
    failure(server, graph, "adapter")
    (server.models / "ipadapter_instruct" / name).write_bytes(
        (server.models / "ipadapter_instruct" / MIN_ADAPTER).read_bytes()
    )
    one(server, graph)


def refused(server: ComfyServer, graph: Graph, node_id: str) -> str:
    """What the host says of a graph that it does not queue."""
    with pytest.raises(ComfyError) as caught:
        server.queue(graph)
    answer = json.loads(str(caught.value).removeprefix("The graph was refused: "))
    (error,) = answer["node_errors"][node_id]["errors"]
    return error["details"]


@FAILS
def test_a_file_that_is_not_there(server: ComfyServer, reference_picture: str) -> None:
    message = refused(server, adapted(reference_picture, adapter="gone.bin"), "adapter")
    assert "There is no file gone.bin; put an adapter such as ip-adapter-instruct-sd15.bin into " in message
    assert str(server.models / "ipadapter_instruct") in message and "press R" in message


@FAILS
@pytest.mark.parametrize("name", ["../checkpoints/" + MIN_CHECKPOINT, "/etc/passwd"])
def test_no_name_leads_out_of_the_folder(server: ComfyServer, reference_picture: str, name: str) -> None:
    assert "There is no file" in refused(server, adapted(reference_picture, adapter=name), "adapter")


@FAILS
def test_an_empty_models_folder(server: ComfyServer, reference_picture: str) -> None:
    folder = server.models / "ipadapter_instruct"
    away = folder.rename(server.models / "away")
    try:
        folder.mkdir()
        options = server.object_info()["IPAdapterInstructModelLoader"]["input"]["required"]["adapter_name"]
        assert MIN_ADAPTER not in json.dumps(options)
        message = refused(server, adapted(reference_picture, adapter=""), "adapter")
        assert "No file is chosen; put an adapter such as" in message and str(folder) in message
        folder.rmdir()
        server.object_info()
    finally:
        if folder.exists():
            folder.rmdir()
        away.rename(folder)


# The wrong model beside a good adapter.


def sdxl_adapter() -> dict:
    """An adapter in SDXL's layout: 70 layers of two widths, tokens 2048 wide."""
    projector = projector_shapes(768)
    projector |= {"proj_out.weight": (2048, 768), "proj_out.bias": (2048,)}
    projector |= {"norm_out.weight": (2048,), "norm_out.bias": (2048,)}
    widths = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
    layers: Shapes = {
        f"{2 * i + 1}.to_{kind}_ip.weight": (width, 2048) for i, width in enumerate(widths) for kind in "kv"
    }
    return {
        "image_proj": strided_weights(projector, adapter_gain, seed=1),
        "ip_adapter": strided_weights(layers, adapter_gain, seed=2),
    }


@FAILS
def test_an_sdxl_adapter_on_an_sd15_model(server: ComfyServer, reference_picture: str, models_file: Any) -> None:
    name = models_file("ipadapter_instruct", "ip-adapter-instruct-sdxl.bin", sdxl_adapter())
    message = failure(server, adapted(reference_picture, adapter=name), "apply")
    assert "ip-adapter-instruct-sdxl.bin is an adapter for SDXL (70 attentions)" in message
    assert "SD15 (3)" in message and "same family" in message


@FAILS
def test_an_adapter_for_another_number_of_layers(server: ComfyServer, reference_picture: str) -> None:
    graph = adapted(reference_picture)
    graph["checkpoint"] = node("CheckpointLoaderSimple", ckpt_name=FULL_CHECKPOINT)
    message = failure(server, graph, "apply")
    assert "(3 attentions)" in message and "SD15 (16)" in message


# What is wrong on any base; on SD3: test_sd3_pictures.py.


@FAILS
@pytest.mark.parametrize("kind", BAD_GRAPHS)
def test_a_graph_that_cannot_go_on(server: ComfyServer, reference_picture: str, models_file: Any, kind: str) -> None:
    BAD_GRAPHS[kind].told(server, adapted(reference_picture), models_file)


# Odd wordings: a picture all the same.


@pytest.mark.parametrize("nothing", ["", "  \n "])
def test_an_empty_instruction_is_the_tasks_own(
    server: ComfyServer, reference_picture: str, healthy: np.ndarray, nothing: str
) -> None:
    own = one(server, adapted(reference_picture, instruction="use the style"))
    np.testing.assert_array_equal(own, healthy)
    np.testing.assert_array_equal(one(server, adapted(reference_picture, instruction=nothing)), own)
    other = one(server, adapted(reference_picture, instruction="use the pose"))
    assert distance(own, other) > 0


def test_a_long_instruction_is_cut_with_a_warning(server: ComfyServer, reference_picture: str) -> None:
    """75 one-token words fit beside the start and the end token."""
    words = ["style"] * 75 + ["umbrella", "teapot"]
    before = len(server.log_text())
    long = one(server, adapted(reference_picture, instruction=" ".join(words)))
    log = server.log_text()[before:]
    assert "longer than CLIP's 77 tokens" in log and "'umbrella teapot'" in log
    before = len(server.log_text())
    fitting = one(server, adapted(reference_picture, instruction=" ".join(words[:75])))
    assert "77 tokens" not in server.log_text()[before:]
    np.testing.assert_array_equal(long, fitting)


# Masks of any size, shape and number.


def with_mask(picture: str, width: int, height: int, value: float, masks: int = 1, batch: int = 1) -> Graph:
    graph = adapted(picture, mask=["mask", 0])
    level = round(value * 255)
    colour = level << 16 | level << 8 | level
    graph["latent"] = rewired(graph["latent"], batch_size=batch)
    graph["plain"] = node("EmptyImage", width=width, height=height, batch_size=masks, color=colour)
    graph["mask"] = node("ImageToMask", image=["plain", 0], channel="red")
    return graph


@pytest.mark.parametrize("width, height", [(1, 1), (7, 300), (640, 480)])
def test_masks_of_any_size(
    server: ComfyServer, reference_picture: str, healthy: np.ndarray, plain: np.ndarray, width: int, height: int
) -> None:
    white = one(server, with_mask(reference_picture, width, height, 1.0))
    np.testing.assert_allclose(white, healthy, atol=1.5 / 255)
    black = one(server, with_mask(reference_picture, width, height, 0.0))
    np.testing.assert_allclose(black, plain, atol=1.5 / 255)
    assert distance(white, black) > CLEARLY


@pytest.mark.parametrize("masks, batch", [(3, 1), (2, 3)])
def test_masks_of_any_number(server: ComfyServer, reference_picture: str, masks: int, batch: int) -> None:
    white = server.run(with_mask(reference_picture, 20, 30, 1.0, masks, batch))
    black = server.run(with_mask(reference_picture, 20, 30, 0.0, masks, batch))
    assert len(white) == len(black) == batch
    assert all(np.isfinite(w).all() and distance(w, b) > CLEARLY for w, b in zip(white, black, strict=True))


# Pictures of any kind (a grey tensor of one channel: test_files.py).


def save_picture(server: ComfyServer, folder: Path, name: str, mode: str, size: tuple[int, int]) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(folder / name)
    return server.upload(folder / name)


@pytest.mark.parametrize(
    "name, mode, size",
    [
        ("grey.png", "L", (30, 20)),
        ("rgba.png", "RGBA", (21, 33)),
        ("dot.png", "RGB", (1, 1)),
        ("wide.png", "RGB", (4000, 1)),
    ],
)
def test_pictures_of_any_kind(
    server: ComfyServer, plain: np.ndarray, tmp_path: Path, name: str, mode: str, size: tuple[int, int]
) -> None:
    image = one(server, adapted(save_picture(server, tmp_path, name, mode, size)))
    assert distance(image, plain) > CLEARLY


def test_a_picture_with_an_alpha_channel(server: ComfyServer, reference_picture: str, healthy: np.ndarray) -> None:
    graph = adapted(reference_picture, image=["rgba", 0])
    graph["clear"] = node("SolidMask", value=1.0, width=32, height=32)
    graph["rgba"] = node("JoinImageWithAlpha", image=["reference", 0], alpha=["clear", 0])
    np.testing.assert_array_equal(one(server, graph), healthy)
