"""The workflows that 0.1.0 shipped, as they were saved then: they still validate and give the same pixels.

Their pictures (tiny models, two steps) lie beside them, made by 0.1.0 itself; `bare.png` is the host's alone. On a
machine that rounds as that one did the bare picture is the same, and so must all others be, bit for bit.
`python -m pytest tests/host/test_older_workflows.py` with RECORD=1 writes them anew: only for a release's own files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import inside
import numpy as np
import pytest
from PIL import Image
from tools.demo.graphs import api_graph, with_inputs
from tools.host.graphs import text_to_image
from tools.host.server import ComfyServer
from tools.tiny.models import TINY_NAMES, with_tiny_names
from tools.workflows.hint_pictures import INPUTS

FOLDER = inside.ROOT / "tests" / "assets" / "workflows_0.1.0"
FILES = sorted(FOLDER.glob("*.json"))
SMALL = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2, "seed": 5}}
ROUNDING = 1 / 255  # mean difference of pixels that another processor makes


def side_by_side(pictures: list[np.ndarray]) -> np.ndarray:
    return np.round(np.concatenate(pictures, axis=1) * 255).astype(np.uint8)


def kept(path: Path, made: np.ndarray) -> np.ndarray:
    if os.environ.get("RECORD"):
        Image.fromarray(made).save(path, optimize=True)
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def rounds_alike(server: ComfyServer) -> bool:
    for picture in INPUTS.glob("*.png"):
        server.upload(picture)
    made = side_by_side(server.run(text_to_image(TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"])))
    return np.array_equal(kept(FOLDER / "bare.png", made), made)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_older_workflow_gives_the_same_pixels(server: ComfyServer, rounds_alike: bool, file: Path) -> None:
    workflow = with_tiny_names(json.loads(file.read_text()))
    made = side_by_side(server.run(with_inputs(api_graph(workflow, server.object_info()), SMALL)))
    before = kept(file.with_suffix(".png"), made)
    if rounds_alike:
        np.testing.assert_array_equal(made, before)
    assert np.abs(made / 255 - before / 255).mean() < ROUNDING
