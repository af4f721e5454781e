"""Our nodes as a person meets them: found in the search box, wired by mouse into a plain graph, run from the page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tools.host.page import ComfyPage
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, TINY_NAMES
from tools.workflows.canvas import Canvas, Json

CLEARLY = 2 / 255  # mean difference of pixels that no rounding explains
PATIENCE_S = 300  # on two cores that others use as well
# What a person types, the node that must come first, and a free spot below the plain graph.
SEARCHES = {
    "Load IPAdapter-Instruct Model": ("IPAdapterInstructModelLoader", 60, 700),
    "CLIPVisionLoader": ("CLIPVisionLoader", 60, 900),
    "LoadImage": ("LoadImage", 500, 700),
    "Encode Instruction": ("IPAdapterInstructEncode", 940, 700),
    "Apply IPAdapter-Instruct": ("IPAdapterInstructApply", 1440, 700),
}
OTHERS = {
    "IPAdapter-Instruct Guider": "IPAdapterInstructGuider",
    "Load OpenCLIP Model": "IPAdapterInstructOpenCLIPLoader",
    "Encode Reference": "IPAdapterInstructEncodeReference",
}
LARGE, USUAL = {"width": 2200, "height": 1300}, {"width": 1600, "height": 900}


@pytest.fixture
def large_page(page: ComfyPage) -> Iterator[ComfyPage]:
    page.page.set_viewport_size(LARGE)
    yield page
    page.page.set_viewport_size(USUAL)


def plain_graph(schemas: Json) -> Json:
    """Text to picture with nodes of the host alone, in the upper half of the page."""
    canvas = Canvas("plain", schemas)
    with canvas.column("Model", "models", 300):
        checkpoint = canvas.node("CheckpointLoaderSimple", ckpt_name=MIN_CHECKPOINT)
    with canvas.column("Prompts", "text", 300):
        positive = canvas.node("CLIPTextEncode", clip=checkpoint["CLIP"], text="a cat").only
        negative = canvas.node("CLIPTextEncode", clip=checkpoint["CLIP"], text="blurry").only
        latent = canvas.node("EmptyLatentImage", width=64, height=64).only
    with canvas.column("Sampling", "picture", 300):
        sampled = canvas.node(
            "KSampler",
            model=checkpoint["MODEL"],
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=1,
            steps=2,
            sampler_name="euler",
            scheduler="normal",
        ).only
        decoded = canvas.node("VAEDecode", samples=sampled, vae=checkpoint["VAE"]).only
    with canvas.column("Result", "picture", 300):
        canvas.node("SaveImage", images=decoded)
    return canvas.workflow()


def test_nodes_from_the_search_box_change_a_plain_graphs_picture(
    large_page: ComfyPage, server: ComfyServer, reference_picture: str
) -> None:
    page = large_page
    page.load(plain_graph(server.object_info()))
    page.page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset[0] = app.canvas.ds.offset[1] = 0; }")
    (bare,) = page.run(PATIENCE_S)

    ids = {}
    for words, (kind, x, y) in SEARCHES.items():
        ids[kind] = page.add_node(words, x, y)
        assert node_type(page, ids[kind]) == kind, f"{words!r} finds another node first"
    loader, vision, image, encode, apply = ids.values()
    page.page.evaluate("id => app.graph.getNodeById(id).setSize([300, 150])", image)
    checkpoint, sampler = (find(page, kind) for kind in ("CheckpointLoaderSimple", "KSampler"))
    page.connect(loader, "adapter", encode, "adapter")
    page.connect(checkpoint, "CLIP", encode, "clip")
    page.connect(checkpoint, "MODEL", apply, "model")
    page.connect(loader, "adapter", apply, "adapter")
    page.connect(encode, "instruction", apply, "instruction")
    page.connect(vision, "CLIP_VISION", apply, "clip_vision")
    page.connect(image, "IMAGE", apply, "image")
    page.connect(apply, "MODEL", sampler, "model")
    page.set_widget(loader, "adapter_name", MIN_ADAPTER)
    page.set_widget(vision, "clip_name", TINY_NAMES["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"])
    page.set_widget(image, "image", reference_picture)
    page.set_widget(encode, "prompt", "a cat")
    page.set_widget(sampler, "control_after_generate", "fixed")

    pictures = [bare]
    for task in ("everything", "style"):
        page.set_widget(encode, "task", task)
        pictures += page.run(PATIENCE_S)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.isfinite(pictures[second]).all()
        assert np.abs(pictures[first] - pictures[second]).mean() > CLEARLY, f"pictures {first} and {second} are alike"
    assert page.errors == []


def test_the_other_nodes_are_found_by_their_names(page: ComfyPage) -> None:
    for place, (words, kind) in enumerate(OTHERS.items()):
        assert node_type(page, page.add_node(words, 150 + 500 * place, 300)) == kind
    assert page.errors == []


def test_clip_inputs_have_the_types_by_which_packs_fill_them_and_take_an_open_clip_model(page: ComfyPage) -> None:
    """Anything Everywhere and its like compare with ==; an OpenCLIP model is connected by mouse all the same."""
    text, vision = page.place_node("CLIPTextEncode", 100, 100), page.place_node("CLIPVisionEncode", 100, 400)
    loader, encode = (
        page.place_node("IPAdapterInstructOpenCLIPLoader", 100, 600),
        page.place_node("IPAdapterInstructEncode", 600, 100),
    )
    apply = page.place_node("IPAdapterInstructApply", 1100, 100)
    assert input_type(page, encode, "clip") == input_type(page, text, "clip")
    assert input_type(page, apply, "clip_vision") == input_type(page, vision, "clip_vision")
    page.connect(loader, "open_clip", encode, "clip")
    page.connect(loader, "open_clip", apply, "clip_vision")
    assert page.errors == []


def test_what_fills_inputs_from_afar_leaves_prompt_clip_beside_a_clip_that_reads_prompts(page: ComfyPage) -> None:
    """Anything Everywhere asks the node; a CLIP with a LoRA that is wired by hand has to encode the prompts, too."""
    encode = page.place_node("IPAdapterInstructEncode", 600, 100)
    checkpoint, loader = (
        page.place_node("CheckpointLoaderSimple", 100, 100),
        page.place_node("IPAdapterInstructOpenCLIPLoader", 100, 400),
    )
    script = """id => { const node = app.graph.getNodeById(id);
        return node.inputs.map(input => input.name).filter(name => node.reject_ue_connection({ name })); }"""
    assert page.page.evaluate(script, encode) == []
    page.connect(loader, "open_clip", encode, "clip")
    assert page.page.evaluate(script, encode) == []
    page.connect(checkpoint, "CLIP", encode, "clip")
    assert page.page.evaluate(script, encode) == ["prompt_clip"]
    assert page.errors == []


def test_prompts_are_written_as_in_clip_text_encode(page: ComfyPage) -> None:
    """Choices and comments are the page's work; a wording of one's own stays as it is written."""
    node = page.place_node("IPAdapterInstructEncode", 300, 100)
    written = "a {red|red} cat // not this\n/* nor\nthis */on a \\{mat\\}"
    for name in ("instruction", "subject", "prompt", "negative_prompt"):
        page.set_widget(node, name, written)
    script = """async id => Object.fromEntries(await Promise.all(app.graph.getNodeById(id).widgets.map(
        async (widget, i) => [widget.name, widget.serializeValue
            ? await widget.serializeValue(app.graph.getNodeById(id), i) : widget.value])))"""
    sent = page.page.evaluate(script, node)
    assert sent["prompt"] == sent["negative_prompt"] == "a red cat \non a {mat}"
    assert sent["instruction"] == sent["subject"] == written


def input_type(page: ComfyPage, node: int, name: str) -> str:
    return page.page.evaluate(
        "([id, name]) => app.graph.getNodeById(id).inputs.find(slot => slot.name === name).type", [node, name]
    )


def node_type(page: ComfyPage, node: int) -> str:
    return page.page.evaluate("id => app.graph.getNodeById(id).type", node)


def find(page: ComfyPage, kind: str) -> int:
    return page.page.evaluate("kind => app.graph.nodes.find(node => node.type === kind).id", kind)


def test_the_scales_are_shown_where_three_way_is_chosen(page: ComfyPage) -> None:
    node = page.place_node("IPAdapterInstructApply", 300, 100)
    hidden = (
        "id => app.graph.getNodeById(id).widgets.filter(w => w.hidden && w.name.endsWith('_scale')).map(w => w.name)"
    )
    assert page.page.evaluate(hidden, node) == ["instruct_scale", "image_scale"]
    page.set_widget(node, "guidance", "three-way")
    assert page.page.evaluate(hidden, node) == []
    page.set_widget(node, "guidance", "auto")
    assert page.page.evaluate(hidden, node) == ["instruct_scale", "image_scale"]
    assert page.errors == []
