"""Every shipped workflow, opened and run in the host's own page with tiny models in place of the real ones."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout import FILES, assert_is_readable, each_workflow
from PIL import Image
from tools.host.page import ComfyPage
from tools.host.server import PACK_NAME, ComfyServer
from tools.tiny.models import with_tiny_names
from tools.workflows.canvas import OUR_ID
from tools.workflows.files import ADAPTER, CHECKPOINT, SCRIBBLE_NET, VISION
from tools.workflows.hint_pictures import INPUTS
from tools.workflows.shipped import GRAPHS, WORKFLOWS, build, index

ROOT = WORKFLOWS.parent
# Small and repeatable; the graph itself stays the shipped one.
SMALL = {
    "EmptyLatentImage": {"width": 64, "height": 64},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2, "seed": 5, "control_after_generate": "fixed"},
}
OPEN_CLIP = "IPADAPTER_INSTRUCT_OPEN_CLIP,CLIP,CLIP_VISION"  # the type of an OpenCLIP model
# What a page shows of files, nodes or versions that it misses: a dialog, or in newer pages a box that leads to a panel.
COMPLAINT = ".p-dialog, [data-testid=error-overlay]"
CLEARLY = 1 / 255  # mean difference of pixels that no rounding explains
PATIENCE_S = 300  # on two cores that others use as well
# What switches off the part that each of these graphs adds; one that is wired past it would still make a picture.
SWITCHES = {
    "everything": ("IPAdapterInstructApply", "weight"),
    "sd3_style": ("IPAdapterInstructApply", "weight"),
    "sd3_style_and_composition_with_canny_controlnet": ("ControlNetApplyAdvanced", "strength"),
    "two_references_two_roles": ("IPAdapterInstructCombineReferences", "weight_2"),
    "not_this_style": ("IPAdapterInstructApply", "weight"),
    "saved_reference": ("IPAdapterInstructApply", "weight"),
    "style_with_scribble_controlnet": ("ControlNetApplyAdvanced", "strength"),
    "face_with_pose_controlnet": ("ControlNetApplyAdvanced", "strength"),
    "style_with_lora": ("LoraLoader", "strength_model"),
    "own_adapter_style_with_scribble_controlnet": ("IPAdapterInstructApply", "weight"),
    "own_adapter_composition_with_lora": ("LoraLoader", "strength_model"),
}
# Where the others make one picture: the sheet, each instruction's and the plain adapter's; a preview and the sheet.
SEVERAL = {"own_adapter_five_instructions": 7, "where_it_looked": 2}
OF_OTHER_SIZES = {"one_picture_five_instructions", "inpainting_with_mask", "upscale_pass", *SEVERAL}


@pytest.fixture(scope="module", autouse=True)
def input_pictures(server: ComfyServer) -> None:
    for picture in INPUTS.glob("*.png"):
        server.upload(picture)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def pixels_are_sound(image: np.ndarray, of_any_size: bool = False) -> bool:
    sized = of_any_size or image.shape == (64, 64, 3)
    return bool(np.isfinite(image).all()) and sized and float(image.std()) > 0.02


def open_small(page: ComfyPage, workflow: dict[str, Any]) -> None:
    """Open a shipped graph with tiny models and, by the page's own widgets, a small size and few steps."""
    workflow = with_tiny_names(workflow)
    page.load(workflow)
    for node in workflow["nodes"]:
        for name, value in SMALL.get(node["type"], {}).items():
            page.set_widget(node["id"], name, value)


@pytest.mark.skipif("COMFYUI_DIR" in os.environ, reason="the files are written from the host that make setup installs")
def test_the_files_are_what_the_builder_writes(server: ComfyServer) -> None:
    built = build(server.object_info())
    assert {file.stem for file in FILES} == set(built) == set(GRAPHS)
    for file in FILES:
        assert read(file) == built[file.stem], f"{file.name} is out of date: run `python -m tools.workflows.shipped`"
    assert (WORKFLOWS / "README.md").read_text() == index(built)


@each_workflow
def test_every_node_fits_the_running_host(server: ComfyServer, file: Path) -> None:
    """Names and kinds of inputs, outputs and links; each combo's value is one that the host offers."""
    schemas, workflow = server.object_info(), with_tiny_names(read(file))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        if node["type"] == "MarkdownNote":
            continue
        schema = schemas[node["type"]]
        declared = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        assert {entry["name"] for entry in node["inputs"]} == set(declared)
        # Newer hosts may have added an output behind those that the file knows.
        assert [output["name"] for output in node["outputs"]] == schema["output_name"][: len(node["outputs"])]
        for name, value in widget_values(node, declared).items():
            kind, *options = declared[name]
            choices = kind if isinstance(kind, list) else (options[0] if options else {}).get("options")
            if choices is not None:
                assert value in choices, f"{node['type']}.{name} is {value!r}, the host offers {choices}"
    for number, source, out_slot, target, in_slot, kind in workflow["links"]:
        accepted = nodes[target]["inputs"][in_slot]
        assert accepted["link"] == number
        assert number in nodes[source]["outputs"][out_slot]["links"]
        assert kind == nodes[source]["outputs"][out_slot]["type"]
        assert set(kind.split(",")) & set(accepted["type"].split(","))


def widget_values(node: dict[str, Any], declared: dict[str, list]) -> dict[str, Any]:
    """The node's widget values by name; the page's companions of a seed and of an upload carry none."""
    values, named = iter(node["widgets_values"]), {}
    for entry in node["inputs"]:
        if "widget" in entry:
            named[entry["name"]] = next(values)
            options = declared[entry["name"]][1] if len(declared[entry["name"]]) > 1 else {}
            if options.get("control_after_generate") or options.get("image_upload"):
                next(values)
    assert next(values, None) is None, f"{node['type']} holds more values than widgets"
    return named


@each_workflow
def test_the_page_opens_it_without_complaint_or_loss(page: ComfyPage, file: Path) -> None:
    """No dialog about nodes, models or versions; what the page would save again is what was shipped."""
    shipped = with_tiny_names(read(file))
    page.load(shipped)
    page.page.wait_for_timeout(300)  # dialogs come one frame after the graph
    assert page.page.locator(COMPLAINT).count() == 0, page.page.locator(COMPLAINT).first.inner_text()
    assert page.page.locator(".p-toast-message-error, .p-toast-message-warn").count() == 0
    assert page.errors == []

    saved = page.workflow()
    assert sorted(saved["links"]) == sorted(shipped["links"])
    by_id = {node["id"]: node for node in saved["nodes"]}
    for node in shipped["nodes"]:
        assert by_id[node["id"]].get("widgets_values", []) == node["widgets_values"], node["type"]
    assert [group["title"] for group in saved["groups"]] == [group["title"] for group in shipped["groups"]]


@each_workflow
def test_nothing_overlaps_and_no_wire_runs_behind_a_node(page: ComfyPage, file: Path) -> None:
    page.load(with_tiny_names(read(file)))
    page.page.wait_for_timeout(100)  # the page measures nodes when it draws them
    assert_is_readable(page)


@each_workflow
def test_it_makes_its_pictures(page: ComfyPage, file: Path) -> None:
    open_small(page, read(file))
    pictures = page.run(PATIENCE_S)
    assert len(pictures) == SEVERAL.get(file.stem, 1)
    assert all(pixels_are_sound(picture, of_any_size=file.stem in OF_OTHER_SIZES) for picture in pictures)
    for first, second in itertools.combinations(pictures, 2):
        alike = first.shape == second.shape and np.abs(first - second).mean() < CLEARLY
        assert not alike, "two instructions made the same picture"
    if file.stem in SWITCHES:
        kind, widget = SWITCHES[file.stem]
        (node,) = (node["id"] for node in read(file)["nodes"] if node["type"] == kind)
        page.set_widget(node, widget, 0.0)
        (without,) = page.run(PATIENCE_S)
        assert np.abs(pictures[0] - without).mean() > CLEARLY, f"{kind} changes nothing: is it wired past?"
    assert page.errors == []


OLDER = sorted((ROOT / "tests" / "assets" / "workflows_0.1.0").glob("*.json"))


@pytest.mark.parametrize("file", OLDER, ids=lambda file: file.stem)
def test_the_page_opens_the_files_of_0_1_0_whole(page: ComfyPage, file: Path) -> None:
    """Every link goes where it went, by the inputs' names, and every widget keeps its value."""
    shipped = with_tiny_names(read(file))
    page.load(shipped)
    page.page.wait_for_timeout(300)
    assert page.page.locator(".p-dialog").count() == 0
    assert page.errors == []
    saved = page.workflow()
    assert named_links(saved) == named_links(shipped)
    by_id = {node["id"]: node for node in saved["nodes"]}
    for node in shipped["nodes"]:
        values = by_id[node["id"]].get("widgets_values", [])
        assert values[: len(node["widgets_values"])] == node["widgets_values"], node["type"]


def named_links(workflow: dict[str, Any]) -> list[tuple]:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    return sorted((a, slot, b, nodes[b]["inputs"][into]["name"]) for _, a, slot, b, into, _ in workflow["links"])


def test_a_file_with_the_types_of_before_opens_whole_and_makes_the_same_picture(page: ComfyPage) -> None:
    """An OpenCLIP model had a type of its own, which our inputs named beside the host's."""
    file, new, old = WORKFLOWS / "own_adapter_composition_with_lora.json", OPEN_CLIP, OPEN_CLIP.split(",")[0]
    before = json.loads(file.read_text().replace(f'"{new}"', f'"{old}"'))
    linked = [node for node in before["nodes"] if node["type"].startswith("IPAdapterInstruct")]
    for entry in [entry for node in linked for entry in node["inputs"] if entry["type"] in ("CLIP", "CLIP_VISION")]:
        entry["type"] += f",{old}"
    pictures = []
    for workflow in (before, read(file)):
        open_small(page, workflow)
        saved = [link[:5] for link in page.workflow()["links"]]
        assert sorted(saved) == sorted(link[:5] for link in workflow["links"])
        pictures += page.run(PATIENCE_S)
    assert pixels_are_sound(pictures[0])
    np.testing.assert_array_equal(*pictures)
    assert page.errors == []


def test_the_page_offers_the_files_that_are_missing(page: ComfyPage) -> None:
    """Of what the workflow names, the page can offer the .safetensors; the note tells where the adapter is."""
    file = WORKFLOWS / "style_with_scribble_controlnet.json"
    page.load(read(file))
    page.page.locator(COMPLAINT).first.wait_for()
    details = page.page.locator(
        "[data-testid=error-overlay-see-errors], [data-testid=error-overlay] :text('See Errors')"
    )
    if details.count():
        details.first.click()
    text = page.page.locator(".p-dialog, [data-testid=properties-panel]").inner_text()
    notes = " ".join(node["widgets_values"][0] for node in read(file)["nodes"] if node["type"] == "MarkdownNote")
    for name in (CHECKPOINT, VISION, SCRIBBLE_NET):
        assert name in text and name in notes
    assert ADAPTER in notes
    page.page.keyboard.press("Escape")


def test_the_template_browser_gets_each_workflow_and_its_picture(server: ComfyServer) -> None:
    assert set(server.get("/workflow_templates")[PACK_NAME]) == {file.stem for file in FILES}
    for file in FILES:
        with urllib.request.urlopen(f"{server.url}/api/workflow_templates/{PACK_NAME}/{file.stem}.jpg") as answer:
            picture = Image.open(io.BytesIO(answer.read()))
        assert picture.format == "JPEG"
        assert max(picture.size) <= 1280 and min(picture.size) >= 200
        assert np.asarray(picture.convert("L")).std() > 10, "an empty picture is of one tone"


def test_nodes_name_the_pack_as_the_registry_knows_it() -> None:
    name = re.search(r'^name = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert name is not None and name[1] == OUR_ID
