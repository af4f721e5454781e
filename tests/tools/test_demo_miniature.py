"""The demo on the miniature: what it changes in the shipped workflows, what it shows, and that a real host runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tools.demo import conditions, references, unchosen
from tools.demo.conditions import CONDITIONS, DRAWN, FILE_NAMES, FIVE, TREE, fitted
from tools.demo.contact_sheet import CELL
from tools.demo.graphs import api_graph, read_workflow
from tools.demo.miniature import DRAWN_PROMPT, LORA_PROMPT, WITH_LORA, WITH_SCRIBBLE, drawing, planned, sheet
from tools.demo.models import needed_files
from tools.host.graphs import Graph
from tools.host.server import ComfyServer
from tools.tiny.models import TINY_NAMES
from tools.workflows.files import ADAPTER, OWN_ADAPTER, VISION
from tools.workflows.hint_pictures import SCRIBBLE
from training.miniature.expand.write import write_models
from training.miniature.world.factors import STYLES, SUBJECTS
from training.miniature.world.words import encode, vocabulary

RUN = (FIVE, WITH_SCRIBBLE, WITH_LORA, references.ROLES, references.NOT_STYLE, references.LOOKED)
CLEARLY = 1 / 255  # mean difference of pixels that no rounding explains


@pytest.fixture(scope="module")
def graphs(server: ComfyServer) -> dict[str, Graph]:
    """The shipped workflows that the demo runs."""
    schemas = server.object_info()
    return {name: api_graph(read_workflow(name), schemas) for name in RUN}


def test_training_saw_no_like_of_what_is_shown() -> None:
    assert all(condition.factors.held_out for condition in (DRAWN, *CONDITIONS, *unchosen.CONDITIONS))
    assert not TREE.factors.held_out, "the sheet says so"


def test_what_was_not_chosen_is_what_the_seeds_give_in_their_order() -> None:
    again = [unchosen.condition(seed) for seed in range(8)]
    assert [*unchosen.CONDITIONS] == again and len({condition.name for condition in again}) == 8
    assert [condition.tasks[-1] for condition in again] == ["object"] * 5 + ["face"] * 3
    for number, condition in enumerate(again):
        assert not {*encode(condition.prompt)} & {*encode(" ".join(STYLES + SUBJECTS))}, condition.prompt
        assert condition.about.startswith(f"{number}: ")


PROMPTS = [condition.prompt for condition in (TREE, *CONDITIONS, *unchosen.CONDITIONS)]


@pytest.mark.parametrize("prompt", [DRAWN_PROMPT, LORA_PROMPT, references.ROLES_PROMPT, *PROMPTS])
def test_the_small_world_knows_every_word_of_a_prompt(prompt: str) -> None:
    assert set(encode(prompt)) <= set(vocabulary())


def test_names_size_pictures_and_words_are_all_that_differs(graphs: dict[str, Graph]) -> None:
    condition = CONDITIONS[0]
    found = {
        (entry["class_type"], name, value)
        for shipped in map(graphs.get, (FIVE, WITH_SCRIBBLE, WITH_LORA))
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
        ("IPAdapterInstructAllTasks", "subject", condition.factors.subject),
    }
    assert found >= words
    assert {value for _, _, value in found - words} == set(FILE_NAMES.values())


def test_of_the_graphs_on_references_it_changes_who_reads_and_which_roles_besides(graphs: dict[str, Graph]) -> None:
    shown = {picture.name: picture.graph for picture in references.planned(graphs)}
    shipped, found = graphs[references.ROLES], shown[references.ROLES]
    links = {
        (entry["class_type"], name, str(value))
        for number, entry in found.items()
        for name, value in entry["inputs"].items()
        if isinstance(value, list) and value != shipped[number]["inputs"].get(name)
    }
    (reads,) = (name for name, entry in found.items() if entry["class_type"] == "IPAdapterInstructOpenCLIPLoader")
    (base,) = (name for name, entry in found.items() if entry["class_type"] == "CheckpointLoaderSimple")
    encode_links = {("clip", str([reads, 0])), ("prompt_clip", str([base, 1]))}
    assert links == {("IPAdapterInstructEncode", *link) for link in encode_links}

    def inputs(graph: Graph, kind: str, name: str) -> list[Any]:
        return [entry["inputs"].get(name) for entry in graph.values() if entry["class_type"] == kind]

    assert inputs(shipped, "IPAdapterInstructEncode", "task") == ["face", "composition"]
    assert inputs(found, "IPAdapterInstructEncode", "task") == ["style", "composition"]
    pictures = inputs(found, "LoadImage", "image")
    assert inputs(shown[references.EXCHANGED], "LoadImage", "image") == pictures[::-1]
    kept, without = (shown[name] for name in (references.WITH_STYLE, references.NOT_STYLE))
    assert inputs(kept, "IPAdapterInstructApply", "negative_reference") == [None]
    assert inputs(without, "IPAdapterInstructEncode", "task") == ["everything", "style"]
    assert inputs(without, "IPAdapterInstructApply", "negative_reference") != [None]


def test_every_picture_has_its_place_on_the_sheet(graphs: dict[str, Graph]) -> None:
    pictures = planned(graphs)
    colours = {picture.name: (index * 9, 255 - index * 9, 77) for index, picture in enumerate(pictures)}
    assert len(colours) == len(pictures) == 5 * len(CONDITIONS) + 2 + 5
    made = {name: Image.new("RGB", (64, 64), colour) for name, colour in colours.items()}
    del colours[references.LOOKED]
    read = [(200 + place, 10, 10) for place in range(5)]
    made[references.LOOKED] = Image.new("RGB", (5 * 236 + 12, 300), (255, 255, 255))
    for place, colour in enumerate(read):
        made[references.LOOKED].paste(colour, (12 + place * 236, 12, 236 + place * 236, 236))
        colours[f"read {place}"] = colour
    whole = sheet(made, {picture.name: picture.graph for picture in pictures})
    count = {colour: number for number, colour in whole.getcolors(1 << 24)}
    assert [count.get(colour) for colour in colours.values()] == [CELL * CELL] * len(colours)


def test_the_sheet_of_what_was_not_chosen_shows_every_picture(graphs: dict[str, Graph]) -> None:
    pictures = [one for shown in unchosen.CONDITIONS for one in conditions.planned(shown, graphs[FIVE])]
    colours = {picture.name: (index * 6, 255 - index * 6, 77) for index, picture in enumerate(pictures)}
    assert len(colours) == 40
    made = {name: Image.new("RGB", (64, 64), colour) for name, colour in colours.items()}
    count = {colour: number for number, colour in unchosen.sheet(made, {}).getcolors(1 << 24)}
    assert [count.get(colour) for colour in colours.values()] == [CELL * CELL] * 40


def test_a_real_comfyui_runs_the_graphs(
    server: ComfyServer, graphs: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny random models under the miniature's names; a row, both combinations, all on references."""
    names = TINY_NAMES | {ADAPTER: TINY_NAMES[OWN_ADAPTER]}
    for module in (conditions, references):
        monkeypatch.setattr(module, "FILE_NAMES", names)
    monkeypatch.setitem(conditions.SETTINGS, "KSampler", {"steps": 2})
    shown: dict[str, Any] = {condition.file: condition.picture for condition in (*CONDITIONS[:2], TREE, DRAWN)}
    for name, picture in {**shown, SCRIBBLE: drawing()}.items():
        picture.save(tmp_path / name)
        server.upload(tmp_path / name)
    pictures = planned(graphs)
    made = [server.run(picture.graph) for picture in [*pictures[:5], *pictures[-7:]]]
    _, looked = made.pop()  # after the square that was read
    assert all(len(found) == 1 and found[0].shape == (64, 64, 3) and found[0].std() > 0.02 for found in made)
    parts = references.cut(Image.fromarray((looked * 255).astype(np.uint8)), 5)
    assert {part.size for part in parts} == {(224, 224)}  # of the node's own cells, wherever they lie
    assert all(np.abs(np.asarray(part, float)[[0, -1]]).mean() < 250 for part in parts), "no margin is within"
    row = [found for (found,) in made[:5]]
    assert all(np.abs(row[0] - other).mean() > CLEARLY for other in row[1:])
    assert all(np.abs(row[1] - other).mean() > CLEARLY for other in row[2:])


def test_the_miniature_is_written_under_the_names_that_the_demo_loads(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    needed = needed_files(map(read_workflow, RUN))
    del needed[VISION]  # its place is taken by the OpenCLIP loader
    for name, folder in needed.items():
        assert (models / folder / FILE_NAMES[name]).is_file(), name
