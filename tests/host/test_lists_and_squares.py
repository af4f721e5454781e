"""All Tasks, Label Sheet, Prepare Reference and Show Where It Looked through the running server."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import inside
import numpy as np
import pytest
import torch
from bench import Bench
from pictures import CLEARLY, VISION, adapted, distance, failure, one
from PIL import Image
from tools.host.graphs import Graph, node, rewired, text_to_image
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_CHECKPOINT, MIN_PAPER_ADAPTER

TASKS = ["everything", "style", "composition", "object", "face", "colour", "pose", "foreground", "background"]
CELL, GAP, TIMES = 192, 12, 3  # of a sheet of pictures of 64 pixels


def plain(picture: str, **settings: Any) -> Graph:
    return adapted(text_to_image(MIN_CHECKPOINT), picture, **({"guidance": "simple"} | settings))


def all_tasks(picture: str, ticked: list[str], wordings: str = "", **settings: Any) -> Graph:
    """The plain graph in one lane: a list of instructions, a sheet of the results."""
    graph = plain(picture, **settings)
    given = {key: graph["instruction"]["inputs"][key] for key in ("adapter", "clip", "prompt", "negative_prompt")}
    ticks = {task: task in ticked for task in TASKS}
    graph["instruction"] = node("IPAdapterInstructAllTasks", **ticks, **given, wordings=wordings, subject="", **{})
    graph["sampler"] = rewired(graph["sampler"], positive=["instruction", 2], negative=["instruction", 3])
    graph["sheet"] = node(
        "IPAdapterInstructLabelSheet",
        images=["decode", 0], columns=0, label=["instruction", 1], reference=["reference", 0],
    )  # fmt: skip
    graph["save"] = rewired(graph["save"], images=["sheet", 0])
    return {key: entry for key, entry in graph.items() if key not in ("positive", "negative")}


def cells_of(sheet: np.ndarray) -> list[np.ndarray]:
    first = CELL + 3 * GAP
    count = (sheet.shape[1] - first) // (CELL + GAP)
    lefts = [first + number * (CELL + GAP) for number in range(count)]
    return [sheet[GAP : GAP + CELL : TIMES, left : left + CELL : TIMES] for left in lefts]


def test_one_lane_makes_the_pictures_of_single_graphs_in_order(server: ComfyServer, reference_picture: str) -> None:
    sheet = one(server, all_tasks(reference_picture, ["style", "face"], "composition: keep the arrangement"))
    cells = cells_of(sheet)
    singles = [{"task": "style"}, {"task": "face"}, {"task": "composition", "instruction": "keep the arrangement"}]
    assert len(cells) == len(singles)
    for cell, settings in zip(cells, singles, strict=True):
        np.testing.assert_array_equal(cell, one(server, plain(reference_picture, **settings)))
    below = sheet[GAP + CELL + 6 :]
    for number in range(4):  # words below the reference and below each picture
        left = GAP if number == 0 else CELL + 3 * GAP + (number - 1) * (CELL + GAP)
        assert (below[:, left : left + CELL] < 0.5).any()


def test_encoders_run_once_for_all_instructions(bench: Bench, tiny_models: Path) -> None:
    import comfy.clip_vision

    nodes = importlib.import_module(f"{inside.PACK}.nodes")
    vision = comfy.clip_vision.load(str(tiny_models / "clip_vision" / VISION))
    counts = {"vision": 0, "text": 0}

    def count(kind: str) -> Any:
        return lambda *_: counts.__setitem__(kind, counts[kind] + 1)

    handles = [
        vision.model.register_forward_hook(count("vision")),
        bench.clip.cond_stage_model.clip_l.transformer.register_forward_hook(count("text")),
    ]
    ticks = {task: task in TASKS[:5] for task in TASKS}
    found = nodes.AllTasks.execute(bench.adapter, bench.clip, "", "", "a cat", "blurry", **ticks)
    picture = torch.rand(1, 64, 64, 3)
    for instruction in found[0]:
        nodes.ApplyAdapter.execute(bench.model, bench.adapter, instruction, vision, picture)
    for handle in handles:
        handle.remove()
    assert len(found[0]) == len(found[1]) == 5
    assert counts["vision"] == 2  # the picture, and no picture
    assert counts["text"] == 5 + 2 + 2 + 2  # wordings; "everything" and nothing; the prompts; the conditionings


def test_no_task_is_told(server: ComfyServer, reference_picture: str) -> None:
    assert "No task is ticked" in failure(server, all_tasks(reference_picture, [], "\n  \n"), "instruction")
    many = "\n".join(f"wording {number}" for number in range(70))
    assert "70 instructions" in failure(server, all_tasks(reference_picture, [], many), "instruction")


# Prepare Reference


def prepared(picture: str, **settings: Any) -> Graph:
    graph = plain(picture)
    given = {"crop_position": "center", "colour": "teal", "seed": 0, "use_mask": "zoom", "margin": 0.5, "size": 224}
    graph["square"] = node("IPAdapterInstructPrepareReference", image=["reference", 0], **(given | settings))
    graph["apply"] = rewired(graph["apply"], image=["square", 0])
    return graph


def square(server: ComfyServer, graph: Graph) -> np.ndarray:
    """What the node shows, which is what it gives."""
    kept = {key: graph[key] for key in ("reference", "square", "mask") if key in graph}
    kept["save"] = node("SaveImage", images=["square", 0], filename_prefix="square")
    saved, shown = server.run(kept)
    np.testing.assert_array_equal(saved, shown)
    return saved


@pytest.fixture
def with_mask(server: ComfyServer, tmp_path: Path) -> str:
    """Blue left of a red square, which alone is transparent: white in Load Image's mask."""
    pixels = np.zeros((100, 200, 4), np.uint8)
    pixels[..., 2], pixels[..., 3] = 255, 255
    pixels[30:70, 140:180] = (255, 0, 0, 0)
    path = tmp_path / "masked.png"
    Image.fromarray(pixels).save(path)
    return server.upload(path)


def test_the_middle_is_what_clip_sees_anyway(server: ComfyServer, reference_picture: str) -> None:
    assert square(server, prepared(reference_picture)).shape == (224, 224, 3)
    direct = one(server, plain(reference_picture))
    # The node shows a picture too; the saved one comes first.
    np.testing.assert_array_equal(server.run(prepared(reference_picture))[0], direct)
    assert distance(server.run(prepared(reference_picture, crop_position="left"))[0], direct) > CLEARLY / 8


def test_a_mask_zooms_and_cuts_out(server: ComfyServer, with_mask: str) -> None:
    teal = np.array([0, 128, 128]) / 255
    graph = prepared(with_mask, mask=["reference", 1])
    zoomed = square(server, graph)
    assert zoomed[112, 112] == pytest.approx([1, 0, 0], abs=0.01)
    red = float((zoomed[..., 0] > 0.5).mean())
    assert red == pytest.approx(1 / 1.5**2, abs=0.03)  # the margin is half of its side
    cut = square(server, prepared(with_mask, mask=["reference", 1], use_mask="cut out", crop_position="pad"))
    assert cut[112, 20] == pytest.approx(teal, abs=0.01)
    assert float((cut[..., 0] > 0.5).mean()) == pytest.approx(40 * 40 / 200**2, abs=0.01)
    both = square(server, prepared(with_mask, mask=["reference", 1], use_mask="cut out and zoom", margin=0.0))
    assert (both[..., 0] > 0.9).all()


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("size", [(7, 5), (400, 90)])
def test_masks_of_other_sizes_full_and_black(
    server: ComfyServer, with_mask: str, size: tuple[int, int], fill: float
) -> None:
    graph = prepared(with_mask, mask=["mask", 0])
    graph["mask"] = node("SolidMask", value=fill, width=size[0], height=size[1])
    if fill == 0.0:
        assert "black everywhere" in failure(server, graph, "square")
    else:
        np.testing.assert_array_equal(square(server, graph), square(server, prepared(with_mask)))


def test_grey_transparent_and_batches() -> None:
    prepare = importlib.import_module(f"{inside.PACK}.nodes.prepare_reference").prepare
    settings = {"crop_position": "pad", "colour": "#ff0000", "seed": 1, "use_mask": "zoom", "margin": 0.0, "size": 64}

    def squares(image: torch.Tensor, **changes: Any) -> torch.Tensor:
        return prepare(image, **(settings | changes))

    assert torch.equal(squares(torch.full((1, 8, 8, 1), 0.2)), squares(torch.full((1, 8, 8, 3), 0.2)))
    clear = torch.cat([torch.full((1, 8, 8, 3), 0.2), torch.zeros(1, 8, 8, 1)], dim=-1)
    assert torch.equal(squares(clear)[0, 5, 5], torch.tensor([1.0, 0.0, 0.0]))
    batch = torch.rand(3, 20, 10, 3)
    for place, found in enumerate(squares(batch)):
        assert torch.equal(found, squares(batch[place : place + 1])[0])
    drawn = squares(batch, colour="random")[:, 0, 0]
    assert len({tuple(colour.tolist()) for colour in drawn}) == 3, "each picture of a batch draws its own colour"
    masks = torch.zeros(2, 20, 10)
    masks[0, :5], masks[1, 10:] = 1.0, 1.0
    each = squares(batch, mask=masks, crop_position="center", size=32)
    for place in range(3):  # dealt out in turn
        alone = squares(batch[place : place + 1], mask=masks[place % 2], crop_position="center", size=32)
        assert torch.equal(each[place], alone[0])


def test_an_unknown_colour_is_told(server: ComfyServer, reference_picture: str) -> None:
    assert "'teel' is no colour" in failure(server, prepared(reference_picture, colour="teel"), "square")


# Show Where It Looked


def looked(picture: str, **settings: Any) -> Graph:
    graph = all_tasks(picture, ["style", "face"])
    given = {key: graph["apply"]["inputs"][key] for key in ("adapter", "instruction", "clip_vision", "image")}
    show = node("IPAdapterInstructShowAttention", **given, **({"show": "attention"} | settings))
    save = node("SaveImage", images=["show", 0], filename_prefix="looked")
    kept = {key: graph[key] for key in ("checkpoint", "adapter", "instruction", "vision", "reference")}
    return {**kept, "show": show, "save": save}


@pytest.mark.parametrize("show", ["attention", "difference to everything"])
def test_it_shows_the_reference_and_each_instruction(server: ComfyServer, reference_picture: str, show: str) -> None:
    sheet = one(server, looked(reference_picture, show=show))
    assert sheet.shape[1] == GAP + 3 * (224 + GAP)
    shown = square(server, prepared(reference_picture))
    np.testing.assert_allclose(sheet[GAP : GAP + 224, GAP : GAP + 224], shown, atol=1 / 255)
    style, face = (sheet[GAP : GAP + 224, left : left + 224] for left in (GAP + 236, GAP + 472))
    assert distance(style, shown) > CLEARLY
    assert np.abs(style - face).max() > 0


def test_a_list_of_references_is_shown_as_a_batch_is(server: ComfyServer, reference_picture: str) -> None:
    batch = looked(reference_picture)
    batch["turned"] = node("ImageInvert", image=["reference", 0])
    batch["both"] = node("ImageBatch", image1=["reference", 0], image2=["turned", 0])
    batch["show"] = rewired(batch["show"], image=["both", 0])
    apart = {**batch, "list": node("RebatchImages", images=["both", 0], batch_size=1)}
    apart["show"] = rewired(batch["show"], image=["list", 0])
    sheet = one(server, batch)
    assert sheet.shape[0] > 2 * 224
    np.testing.assert_array_equal(one(server, apart), sheet)


def test_an_instruction_of_another_adapter_is_told(server: ComfyServer, reference_picture: str) -> None:
    graph = looked(reference_picture)
    graph["other"] = node("IPAdapterInstructModelLoader", adapter_name=MIN_PAPER_ADAPTER)
    graph["show"] = rewired(graph["show"], adapter=["other", 0])
    assert "encoded for another adapter" in failure(server, graph, "show")
