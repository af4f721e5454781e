"""The demo on released weights without a server: graphs, sheet, and sentences about files that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tools.demo import contact_sheet as layout
from tools.demo.contact_sheet import Cell, Row, contact_sheet
from tools.demo.graphs import (
    Picture,
    api_graph,
    read_workflow,
    renamed,
    saving,
    text_of,
    with_inputs,
    without_adapter,
)
from tools.demo.models import CONTEXT_KEY, LATENT_KEY, needed_files, real_names
from tools.demo.released import COMBINED, TASKS, plain_cell, planned, sheet, task_label
from tools.host.graphs import Graph, node, text_to_image
from tools.tiny.models import TINY_NAMES
from tools.workflows.hint_pictures import INPUTS

ROOT = Path(__file__).resolve().parents[2]
RED, BLUE = (200, 30, 40), (20, 60, 210)
NEEDED = needed_files(map(read_workflow, (*TASKS, *COMBINED)))


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the pixels of one colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def test_each_picture_is_on_the_sheet_whole_and_in_its_place() -> None:
    colours = [(index * 20 + 10, 255 - index * 20, 90) for index in range(6)]
    rows = [
        Row("", "", [Cell(plain(colour), "label") for colour in colours[:3]], left=Cell(plain(RED), "Reference")),
        Row("Heading", "about it", [Cell(plain(colour), "label") for colour in colours[3:]]),
    ]
    result = contact_sheet("Title", "subtitle", rows, "foot")
    boxes = [area(result, colour) for colour in [RED, *colours]]
    assert all(box and (box[2] - box[0], box[3] - box[1]) == (layout.CELL,) * 2 for box in boxes)
    reference, *cells = boxes
    assert reference[0] == layout.MARGIN
    gaps = [right[0] - left[2] for left, right in zip(cells[:2], cells[1:3], strict=True)]
    assert gaps == [layout.GAP] * 2
    assert [cell[0] for cell in cells[:3]] == [cell[0] for cell in cells[3:]]
    assert len({cell[1] for cell in cells[:3]} | {reference[1]}) == 1
    assert cells[3][1] - cells[0][1] == layout.CELL_HEIGHT + layout.GAP
    assert result.width - cells[2][2] == layout.MARGIN


def test_a_wide_picture_keeps_its_proportions() -> None:
    result = contact_sheet("t", "s", [Row("h", "a", [Cell(plain(BLUE, (100, 25)), "wide")])], "f")
    left, top, right, bottom = area(result, BLUE)
    assert (right - left, bottom - top) == (layout.CELL, layout.CELL // 4)


def test_no_text_leaves_its_cell() -> None:
    """Of texts far too long nothing may be drawn over a neighbour or the margin."""
    long = "a very long text that goes on " * 20
    cells = [Cell(plain(RED), long, long), Cell(plain(RED), long, long)]
    result = np.asarray(contact_sheet(long, long, [Row(long, long, cells)], long)).min(axis=-1)
    drawn = np.nonzero((result < 250).any(axis=0))[0]
    assert drawn.min() >= layout.MARGIN - 1
    assert drawn.max() <= result.shape[1] - layout.MARGIN
    below_head = layout.MARGIN + layout.TITLE + 2 * layout.LINE + layout.GAP
    first_cell_ends = layout.MARGIN + 2 * layout.CELL + 2 * layout.GAP
    between_cells = result[below_head : -layout.MARGIN - layout.LINE, first_cell_ends + 1 :][:, : layout.GAP - 2]
    assert (between_cells > 250).all()


def adapted_graph() -> Graph:
    graph = text_to_image("real.safetensors", prompt="a fox")
    graph["apply"] = node("IPAdapterInstructApply", model=["checkpoint", 0], instruction=["instruction", 0])
    graph["again"] = node("IPAdapterInstructApply", model=["apply", 0], instruction=["instruction", 0])
    graph["instruction"] = node("IPAdapterInstructEncode", task="style", subject="")
    graph["sampler"]["inputs"]["model"] = ["again", 0]
    return graph


def test_without_adapter_is_the_plain_graph() -> None:
    assert without_adapter(adapted_graph()) == text_to_image("real.safetensors", prompt="a fox")


def test_prompts_that_our_node_encodes_are_encoded_by_the_host_instead() -> None:
    graph, plain = adapted_graph(), text_to_image("real.safetensors", prompt="a fox")
    texts = {"prompt": "a fox", "negative_prompt": "blurry", "clip": ["checkpoint", 1]}
    graph["instruction"]["inputs"] |= texts
    graph["sampler"]["inputs"] |= {"positive": ["instruction", 1], "negative": ["instruction", 2]}
    del graph["positive"], graph["negative"]
    assert text_of(graph) == "a fox"
    plain["instruction_1"], plain["instruction_2"] = plain.pop("positive"), plain.pop("negative")
    plain["sampler"]["inputs"] |= {"positive": ["instruction_1", 0], "negative": ["instruction_2", 0]}
    assert without_adapter(graph) == plain


def test_the_prompt_is_found_and_inputs_are_replaced_on_a_copy() -> None:
    graph = adapted_graph()
    changed = with_inputs(graph, {"KSampler": {"steps": 9}})
    assert (changed["sampler"]["inputs"]["steps"], graph["sampler"]["inputs"]["steps"]) == (9, 2)
    assert text_of(graph) == "a fox"
    assert renamed(graph, {"real.safetensors": "x.ckpt"})["checkpoint"]["inputs"]["ckpt_name"] == "x.ckpt"


def test_of_several_pictures_only_the_wanted_one_is_saved() -> None:
    graph = text_to_image("real.safetensors")
    (kept,) = (entry for entry in graph.values() if entry["class_type"] == "SaveImage")
    several = {**graph, "other": node("SaveImage", images=["decode", 0], filename_prefix="other")}
    assert saving(several, kept["inputs"]["filename_prefix"]) == graph


def test_the_page_s_companions_of_a_seed_are_no_inputs() -> None:
    schemas = {
        "KSampler": {
            "input": {
                "required": {
                    "model": ["MODEL"],
                    "seed": ["INT", {"control_after_generate": True}],
                    "steps": ["INT", {}],
                    "sampler_name": [["euler"]],
                }
            }
        }
    }
    widgets = [{"name": name, "link": None, "widget": {"name": name}} for name in ("seed", "steps", "sampler_name")]
    inputs = [{"name": "model", "link": 4}, *widgets]
    workflow = {
        "links": [[4, 7, 0, 2, 0, "MODEL"]],
        "nodes": [
            {"id": 2, "type": "KSampler", "inputs": inputs, "widgets_values": [1, "randomize", 25, "euler"]},
            {"id": 3, "type": "MarkdownNote", "inputs": [], "widgets_values": ["note"]},
        ],
    }
    assert api_graph(workflow, schemas) == {
        "2": node("KSampler", seed=1, steps=25, sampler_name="euler", model=["7", 0])
    }


def test_every_graph_has_its_place_on_the_sheet() -> None:
    graphs = dict.fromkeys([*TASKS, *COMBINED], adapted_graph())
    pictures = planned(graphs)
    assert len(pictures) == 2 * len(TASKS) + len(COMBINED)
    assert Picture("style_without", text_to_image("real.safetensors", prompt="a fox")) in pictures
    colours = {picture.name: (index * 15 + 5, 250 - index * 15, 77) for index, picture in enumerate(pictures)}
    result = sheet({name: plain(colour) for name, colour in colours.items()}, graphs, "foot")
    assert all(area(result, colour) for colour in colours.values())


def test_labels_say_what_is_taken_and_how_far_the_plain_picture_is() -> None:
    graph = adapted_graph()
    assert task_label("style", graph) == "Style"
    graph["instruction"]["inputs"]["subject"] = "red teapot"
    assert task_label("object", graph) == "Object: red teapot"
    assert plain_cell(plain((9, 9, 9)), plain((4, 4, 4))).caption.endswith(" by 5 of 255")


def test_the_shipped_workflows_need_the_files_that_have_tiny_stand_ins() -> None:
    workflows = [path.stem for path in (ROOT / "workflows").glob("*.json")]
    assert set(needed_files(map(read_workflow, workflows))) == set(TINY_NAMES)
    assert all((INPUTS / name).is_file() for name in ("astronaut.png", "cottage_scribble.png", "waving_pose.png"))


def fill(models: Path, files: list[str]) -> Path:
    for file in files:
        (models / file).parent.mkdir(parents=True, exist_ok=True)
        (models / file).touch()
    return models


def test_real_files_are_found_under_the_names_that_people_have(tmp_path: Path) -> None:
    files = [
        "checkpoints/anything.safetensors",
        "ipadapter_instruct/SD15/ip-adapter-instruct-sd15.safetensors",
        "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
        "controlnet/control_v11p_sd15_scribble.pth",
        "controlnet/control_v11p_sd15_openpose_fp16.safetensors",
        "loras/broken.safetensors",
    ]
    models = fill(tmp_path, files)
    checkpoint = {CONTEXT_KEY: torch.zeros(2, 768), LATENT_KEY: torch.zeros(2, 4, 3, 3)}
    save_file(checkpoint, models / "checkpoints" / "mine.safetensors")
    for name, width in (("a_sdxl", 2048), ("b_sd15", 768)):
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
        save_file({key: torch.zeros(4, width)}, models / "loras" / f"{name}.safetensors")
    assert real_names(models, NEEDED) == {
        "v1-5-pruned-emaonly-fp16.safetensors": "mine.safetensors",
        "ip-adapter-instruct-sd15.bin": os.path.join("SD15", "ip-adapter-instruct-sd15.safetensors"),
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
        "control_v11p_sd15_scribble_fp16.safetensors": "control_v11p_sd15_scribble.pth",
        "control_v11p_sd15_openpose_fp16.safetensors": "control_v11p_sd15_openpose_fp16.safetensors",
        "pixel_art_style_sd15.safetensors": "b_sd15.safetensors",
    }


def test_missing_files_are_named_with_their_places_in_one_sentence(tmp_path: Path) -> None:
    names = [f"{folder}/{name}" for name, folder in NEEDED.items() if folder not in ("loras", "ipadapter_instruct")]
    with pytest.raises(ValueError) as error:
        real_names(fill(tmp_path, names), NEEDED)
    assert str(error.value) == (
        f"Files are missing in {tmp_path}: put ip-adapter-instruct-sd15.bin into ipadapter_instruct and "
        "any SD1.5 LoRA (.safetensors) into loras (README.md says where to get them)."
    )


@pytest.mark.parametrize("made, hint", [("", "no folder `checkpoints`."), ("models/checkpoints", "did you mean")])
def test_a_wrong_models_path_is_one_sentence_and_ends_with_1(tmp_path: Path, made: str, hint: str) -> None:
    (tmp_path / made).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MODELS": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", "tools.demo.run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert hint in ended.stderr
