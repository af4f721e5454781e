"""The demo on the miniature: what it changes in the shipped workflows, what it shows, and that a real host runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tools.demo import miniature
from tools.demo.contact_sheet import CELL
from tools.demo.graphs import api_graph, read_workflow
from tools.demo.miniature import (
    CONDITIONS,
    DRAWN,
    DRAWN_PROMPT,
    FILE_NAMES,
    FIVE,
    LORA_PROMPT,
    WITH_LORA,
    WITH_SCRIBBLE,
    drawing,
    fitted,
    planned,
    sheet,
)
from tools.demo.models import needed_files
from tools.host.graphs import Graph
from tools.host.server import ComfyServer
from tools.tiny.models import TINY_NAMES
from tools.workflows.hint_pictures import SCRIBBLE
from training.miniature.expand.write import write_models
from training.miniature.world.words import encode, vocabulary

CLEARLY = 1 / 255  # mean difference of pixels that no rounding explains


@pytest.fixture(scope="module")
def graphs(server: ComfyServer) -> dict[str, Graph]:
    """The shipped workflows that the demo runs."""
    schemas = server.object_info()
    return {name: api_graph(read_workflow(name), schemas) for name in (FIVE, WITH_SCRIBBLE, WITH_LORA)}


def test_training_saw_no_like_of_what_is_shown() -> None:
    assert all(factors.held_out for factors in (DRAWN, *(condition.factors for condition in CONDITIONS)))


@pytest.mark.parametrize("prompt", [DRAWN_PROMPT, LORA_PROMPT, *(condition.prompt for condition in CONDITIONS)])
def test_the_small_world_knows_every_word_of_a_prompt(prompt: str) -> None:
    assert set(encode(prompt)) <= set(vocabulary())


def test_names_size_pictures_and_words_are_all_that_differs(graphs: dict[str, Graph]) -> None:
    condition = CONDITIONS[0]
    found = {
        (entry["class_type"], name, value)
        for shipped in graphs.values()
        for number, entry in fitted(shipped, condition).items()
        for name, value in entry["inputs"].items()
        if value != shipped[number]["inputs"][name]
    }
    words = {
        ("EmptyLatentImage", "width", 64),
        ("EmptyLatentImage", "height", 64),
        ("LoadImage", "image", f"{condition.name}.png"),
        ("PrimitiveStringMultiline", "value", condition.prompt),
        ("PrimitiveStringMultiline", "value", ""),
        ("IPAdapterInstructEncode", "prompt", condition.prompt),
        ("IPAdapterInstructEncode", "negative_prompt", ""),
        ("IPAdapterInstructEncode", "subject", condition.factors.subject),
    }
    assert found >= words
    assert {value for _, _, value in found - words} == set(FILE_NAMES.values())


def test_every_picture_has_its_place_on_the_sheet(graphs: dict[str, Graph]) -> None:
    pictures = planned(graphs)
    colours = {picture.name: (index * 9, 255 - index * 9, 77) for index, picture in enumerate(pictures)}
    assert len(colours) == len(pictures) == 5 * len(CONDITIONS) + 2
    made = {name: Image.new("RGB", (64, 64), colour) for name, colour in colours.items()}
    whole = sheet(made, {picture.name: picture.graph for picture in pictures})
    count = {colour: number for number, colour in whole.getcolors(1 << 24)}
    assert [count.get(colour) for colour in colours.values()] == [CELL * CELL] * len(pictures)


def test_a_real_comfyui_runs_the_graphs(
    server: ComfyServer, graphs: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny random models under the miniature's names; a row and both combinations."""
    monkeypatch.setattr(miniature, "FILE_NAMES", TINY_NAMES)
    monkeypatch.setitem(miniature.SETTINGS, "KSampler", {"steps": 2})
    shown: dict[str, Any] = {f"{condition.name}.png": condition.picture for condition in CONDITIONS[:2]}
    for name, picture in {**shown, SCRIBBLE: drawing()}.items():
        picture.save(tmp_path / name)
        server.upload(tmp_path / name)
    pictures = planned(graphs)
    made = [server.run(picture.graph) for picture in [*pictures[:5], *pictures[-2:]]]
    assert all(len(found) == 1 and found[0].shape == (64, 64, 3) and found[0].std() > 0.02 for found in made)
    row = [found for (found,) in made[:5]]
    assert all(np.abs(row[0] - other).mean() > CLEARLY for other in row[1:])
    assert all(np.abs(row[1] - other).mean() > CLEARLY for other in row[2:])


def test_the_miniature_is_written_under_the_names_that_the_demo_loads(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    for name, folder in needed_files(map(read_workflow, (FIVE, WITH_SCRIBBLE, WITH_LORA))).items():
        assert (models / folder / FILE_NAMES[name]).is_file(), name
