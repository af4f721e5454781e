"""Graphs that cannot go on, on whatever base: what is wrong with each, the node that says so, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pictures import failure
from tools.host.graphs import Graph, node, rewired
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_PAPER_ADAPTER, clip_gain
from tools.tiny.shapes import Shapes, clip_vision_shapes
from tools.tiny.strided_weights import strided_weights

NAN = float("nan")
PutFile = Callable[[str, str, Any], str]  # into a folder of the server's models, by a name, some weights


class BadGraph(NamedTuple):
    """``change`` what a healthy graph has under these names; ``node`` then fails with ``words`` in its sentence."""

    change: Callable[[Graph, PutFile], Graph]
    node: str
    words: tuple[str, ...]

    def told(self, server: ComfyServer, healthy: Graph, put: PutFile) -> None:
        message = failure(server, {**healthy, **self.change(healthy, put)}, self.node)
        assert all(word in message for word in self.words), message


def set_on_apply(**settings: Any) -> Callable[[Graph, PutFile], Graph]:
    return lambda graph, put: {"apply": rewired(graph["apply"], **settings)}


def other_vision(graph: Graph, put: PutFile) -> Graph:
    weights = strided_weights(clip_vision_shapes(1024, 24, 768), clip_gain, seed=1)
    return {"vision": node("CLIPVisionLoader", clip_name=put("clip_vision", "ViT-L-14.bin", weights))}


def other_instruction(graph: Graph, put: PutFile) -> Graph:
    other = node("IPAdapterInstructModelLoader", adapter_name=MIN_PAPER_ADAPTER)
    return {"other": other, "instruction": rewired(graph["instruction"], adapter=["other", 0])}


def other_clip(graph: Graph, put: PutFile) -> Graph:
    t5 = node("CLIPLoader", clip_name=put("text_encoders", "t5_base.bin", t5_base()), type="stable_audio")
    return {"t5": t5, "instruction": rewired(graph["instruction"], clip=["t5", 0])}


def t5_base() -> dict:
    """T5-base's encoder, which the host takes for a CLIP of its own."""
    shapes: Shapes = {"shared.weight": (32128, 768), "encoder.final_layer_norm.weight": (768,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 12)
    for block in (f"encoder.block.{i}" for i in range(12)):
        shapes |= {f"{block}.layer.0.SelfAttention.{name}.weight": (768, 768) for name in "qkvo"}
        shapes |= {f"{block}.layer.{i}.layer_norm.weight": (768,) for i in (0, 1)}
        shapes |= {f"{block}.layer.1.DenseReluDense.wi.weight": (3072, 768)}
        shapes |= {f"{block}.layer.1.DenseReluDense.wo.weight": (768, 3072)}
    return strided_weights(shapes, lambda key: 1.0, seed=1)


def overflowed(graph: Graph, put: PutFile) -> Graph:
    return {
        "nan": node("LatentMultiply", samples=["latent", 0], multiplier=NAN),
        "overflowed": node("VAEDecode", samples=["nan", 0], vae=["checkpoint", 2]),
        "apply": rewired(graph["apply"], image=["overflowed", 0]),
    }


BAD_GRAPHS = {
    "another CLIP vision": BadGraph(
        other_vision, "apply", ("1024 wide", "1280 wide", "CLIP-ViT-H-14-laion2B-s32B-b79K")
    ),
    "another adapter's instruction": BadGraph(
        other_instruction, "apply", ("encoded for another adapter; connect the same",)
    ),
    "a CLIP without CLIP-L": BadGraph(
        other_clip, "instruction", ("reads CLIP-L, which the connected CLIP does not hold", "clip_l.safetensors")
    ),
    "no range": BadGraph(
        set_on_apply(start_percent=0.5, end_percent=0.5),
        "apply",
        ("start_percent (0.5) is not before end_percent (0.5)", "lower the start"),
    ),
    "a range that is turned round": BadGraph(
        set_on_apply(start_percent=0.9, end_percent=0.2),
        "apply",
        ("start_percent (0.9) is not before end_percent (0.2)", "lower the start"),
    ),
    # What is no number would else make a black picture without a word.
    "a reference of a VAE that overflowed": BadGraph(
        overflowed, "apply", ("not numbers (NaN or infinite)", "VAE in float32")
    ),
    "a weight that is no number": BadGraph(set_on_apply(weight=NAN), "apply", ("weight is nan",)),
    "a scale that is no number": BadGraph(set_on_apply(image_scale=NAN), "apply", ("image_scale is nan",)),
}
