"""API-format graphs that the tests, the demo and the benchmarks start from."""

from __future__ import annotations

from typing import Any

Graph = dict[str, Any]


def text_to_image(
    checkpoint: str, prompt: str = "a cat", negative: str = "blurry", size: int = 64, batch: int = 1, **sampler: Any
) -> Graph:
    """The plain graph of ComfyUI: checkpoint → prompts → KSampler → picture.

    Node ids are words, so that a test can say `graph["sampler"]["inputs"]["model"] = ["apply", 0]`.

    Args:
        checkpoint: a file of the checkpoints folder.
        size: width and height in pixels.
        sampler: KSampler inputs that differ from two Euler steps at cfg 7, seed 1.
    """
    settings = {"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text=negative),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=batch),
        "sampler": node(
            "KSampler",
            model=["checkpoint", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            **{**settings, **sampler},
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API graph; a link is [node id, output index]."""
    return {"class_type": class_type, "inputs": inputs}


def with_controlnet(graph: Graph, controlnet: str, image: str, strength: float = 1.0) -> Graph:
    """The graph with a ControlNet on both prompts, its hint read from an uploaded picture."""
    return {
        **graph,
        "hint": node("LoadImage", image=image),
        "controlnet": node("ControlNetLoader", control_net_name=controlnet),
        "controlled": node(
            "ControlNetApplyAdvanced",
            positive=["positive", 0],
            negative=["negative", 0],
            control_net=["controlnet", 0],
            image=["hint", 0],
            strength=strength,
            start_percent=0.0,
            end_percent=1.0,
        ),
        "sampler": rewired(graph["sampler"], positive=["controlled", 0], negative=["controlled", 1]),
    }


def with_lora(graph: Graph, lora: str, strength: float = 1.0) -> Graph:
    """The graph with a LoRA on the checkpoint's model and text encoder."""
    loader = node(
        "LoraLoader",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        lora_name=lora,
        strength_model=strength,
        strength_clip=strength,
    )
    return {
        **graph,
        "lora": loader,
        "positive": rewired(graph["positive"], clip=["lora", 1]),
        "negative": rewired(graph["negative"], clip=["lora", 1]),
        "sampler": rewired(graph["sampler"], model=["lora", 0]),
    }


def rewired(graph_node: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """A copy of a node with some inputs replaced."""
    return {**graph_node, "inputs": {**graph_node["inputs"], **inputs}}
