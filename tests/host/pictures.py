"""Pictures through the running server: graphs with our nodes in them, and how far two pictures are apart."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tools.host.graphs import Graph, node, rewired
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_ADAPTER, TINY_NAMES

VISION = TINY_NAMES["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"]
CLEARLY = 2 / 255  # mean difference of pixels that no rounding explains


def adapted(graph: Graph, picture: str, adapter: str = MIN_ADAPTER, **settings: Any) -> Graph:
    """The graph with our three nodes before its sampler; settings and links go to Encode Instruction or to Apply."""
    clip, model = graph["positive"]["inputs"]["clip"], graph["sampler"]["inputs"]["model"]
    encode = {"adapter": ["adapter", 0], "clip": clip, "task": "style", "instruction": "", "subject": ""}
    encode |= {"prompt": "a cat", "negative_prompt": "blurry"}
    apply = {
        "model": model,
        "adapter": ["adapter", 0],
        "instruction": ["instruction", 0],
        "clip_vision": ["vision", 0],
        "image": ["reference", 0],
        "weight": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "guidance": "auto",
        "instruct_scale": 2.0,
        "image_scale": 1.0,
        "combine_images": "concatenate",
    }
    encode |= {key: value for key, value in settings.items() if key in encode}
    apply |= {key: value for key, value in settings.items() if key not in encode}
    return {
        **graph,
        "adapter": node("IPAdapterInstructModelLoader", adapter_name=adapter),
        "instruction": node("IPAdapterInstructEncode", **encode),
        "vision": node("CLIPVisionLoader", clip_name=VISION),
        "reference": node("LoadImage", image=picture),
        "apply": node("IPAdapterInstructApply", **apply),
        "sampler": rewired(graph["sampler"], model=["apply", 0]),
    }


def one(server: ComfyServer, graph: Graph) -> np.ndarray:
    """The graph's only picture, finite and not of one colour: float [H, W, C] in 0-1."""
    (image,) = server.run(graph)
    assert np.isfinite(image).all()
    assert image.std() > 0.02
    return image


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures."""
    return float(np.abs(a - b).mean())


def failure(server: ComfyServer, graph: Graph, node_id: str) -> str:
    """The one sentence or two with which a node fails, as the page shows it."""
    prompt = server.queue(graph)
    deadline = time.monotonic() + 120
    while not (history := server.get(f"/history/{prompt}")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    errors = [details for kind, details in history[prompt]["status"]["messages"] if kind == "execution_error"]
    assert len(errors) == 1, "the graph was expected to fail"
    details = errors[0]
    assert details["node_id"] == node_id and details["exception_type"] == "ValueError", details
    message = details["exception_message"].strip()
    assert "\n" not in message and 30 < len(message) < 330 and message.endswith("."), message
    return message
