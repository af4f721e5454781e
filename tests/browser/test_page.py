"""The browser bench itself: the host's nodes, searched for, wired by mouse, run from the page, saved and reopened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tools.host.graphs import text_to_image
from tools.host.page import ComfyPage
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_CHECKPOINT

# Below the corner in which newer pages tell of errors, such as a default graph whose checkpoint is missing.
PLACES = {
    "CheckpointLoaderSimple": (100, 350),
    "CLIPTextEncode": (450, 120),
    "EmptyLatentImage": (450, 640),
    "KSampler": (900, 250),
    "VAEDecode": (1250, 350),
    "SaveImage": (1250, 500),
}


def build_text_to_image(page: ComfyPage) -> dict[str, int]:
    """Build ComfyUI's first graph by hand, with one prompt for both sides; returns the nodes' ids by type."""
    ids = {name: page.add_node(name, x, y) for name, (x, y) in PLACES.items()}
    loader, text, sampler = ids["CheckpointLoaderSimple"], ids["CLIPTextEncode"], ids["KSampler"]
    page.connect(loader, "CLIP", text, "clip")
    page.connect(loader, "MODEL", sampler, "model")
    page.connect(text, "CONDITIONING", sampler, "positive")
    page.connect(text, "CONDITIONING", sampler, "negative")
    page.connect(ids["EmptyLatentImage"], "LATENT", sampler, "latent_image")
    page.connect(sampler, "LATENT", ids["VAEDecode"], "samples")
    page.connect(loader, "VAE", ids["VAEDecode"], "vae")
    page.connect(ids["VAEDecode"], "IMAGE", ids["SaveImage"], "images")
    page.set_widget(loader, "ckpt_name", MIN_CHECKPOINT)
    page.set_widget(ids["EmptyLatentImage"], "width", 64)
    page.set_widget(ids["EmptyLatentImage"], "height", 64)
    settings = {"seed": 1, "control_after_generate": "fixed", "steps": 2, "cfg": 7.0, "scheduler": "normal"}
    for name, value in settings.items():
        page.set_widget(sampler, name, value)
    page.set_widget(text, "text", "a cat")
    return ids


def test_a_graph_built_in_the_page_makes_the_same_picture_as_over_http(
    page: ComfyPage, server: ComfyServer, tmp_path: Path
) -> None:
    ids = build_text_to_image(page)
    (from_page,) = page.run()
    (from_http,) = server.run(text_to_image(MIN_CHECKPOINT, negative="a cat"))
    np.testing.assert_array_equal(from_page, from_http)

    saved = page.workflow()
    picture = np.asarray(Image.open(page.graph_picture(tmp_path / "graph.png")))
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100, "an empty canvas has few colours"
    page.clear()
    page.load(saved)
    page.set_widget(ids["KSampler"], "seed", 2)
    (other_seed,) = page.run()
    assert np.abs(other_seed - from_page).mean() > 2 / 255
    assert page.errors == []
