"""Pictures of the shipped workflows for ComfyUI's template browser: the reference beside what the graph makes of it.

`python -m tools.demo.thumbnails [NAME ...]` runs the graphs on the miniature. What it lacks the models for (a LoRA that
leaves the reference's style alone, too) is shown as a graph.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tools.host.graphs import Graph, node
from tools.host.page import ComfyPage, comfy_page
from tools.host.server import ComfyServer
from tools.workflows.canvas import Json
from tools.workflows.files import PLACES
from tools.workflows.hint_pictures import INPUTS, SCRIBBLE
from tools.workflows.shipped import GRAPHS, WORKFLOWS
from training.miniature.expand.write import write_models

from .conditions import BOAT, CAT, FISH, OLD_WOMAN, Condition, enlarged, fitted, on_an_own_adapter
from .contact_sheet import Cell, Row, contact_sheet
from .graphs import api_graph, read_workflow
from .miniature import DRAWN_PROMPT, LORA_PROMPT, drawing

WIDTH, MARGIN, QUALITY = 1280, 24, 80  # at most; around a graph
FOOT_SIZE, PATIENCE_S = 14, 600
FOOT = "By the miniature: small models of a small drawn world."
SHEETS = {
    "one_picture_five_instructions",
    "where_it_looked",
    "own_adapter_five_instructions",
}  # whose result is a labelled sheet already
CHANGED = "changed.png"


@dataclass(frozen=True)
class Example:
    """What a workflow is shown on.

    Attributes:
        condition: the reference, and the prompt unless another is given.
        second: another picture that goes in, by what stands above it.
        replaces: the file that it goes in for.
    """

    condition: Condition
    prompt: str = ""
    second: tuple[str, Image.Image] | None = None
    replaces: str = SCRIBBLE


def with_hole(picture: Image.Image) -> Image.Image:
    """Transparent where it is to be painted anew: LoadImage makes a mask of that."""
    alpha = Image.new("L", picture.size, 255)
    ImageDraw.Draw(alpha).rectangle((0, 20, 30, 50), fill=0)
    return Image.merge("RGBA", (*picture.split(), alpha))


SCRIBBLED = Example(BOAT, DRAWN_PROMPT, ("Lines from this", drawing()))
EXAMPLES = {
    "everything": Example(CAT),
    "style": Example(BOAT),
    "composition": Example(BOAT),
    "object": Example(FISH),
    "face": Example(OLD_WOMAN),
    "style_with_scribble_controlnet": SCRIBBLED,
    "one_picture_five_instructions": Example(BOAT),
    "two_references_two_roles": Example(OLD_WOMAN, second=("Composition of this", CAT.picture)),
    "not_this_style": Example(CAT, "something in the snow, stained glass"),
    "saved_reference": Example(BOAT),
    "where_it_looked": Example(FISH),
    "inpainting_with_mask": Example(BOAT, second=("Picture to change", with_hole(CAT.picture)), replaces=CHANGED),
    "upscale_pass": Example(BOAT),
    "own_adapter_five_instructions": Example(BOAT),
    "own_adapter_style_with_scribble_controlnet": SCRIBBLED,
    "own_adapter_composition_with_lora": Example(BOAT, LORA_PROMPT),
}


def with_picture_to_change(graph: Graph) -> Graph:
    """Inpainting's second picture under a name of its own."""
    changed = next(entry["inputs"]["pixels"][0] for entry in graph.values() if "pixels" in entry["inputs"])
    return graph | {changed: node("LoadImage", image=CHANGED)}


def result_of(server: ComfyServer, name: str, schemas: Json) -> Image.Image:
    """The picture that a workflow makes on the miniature; the last of several, or the sheet."""
    example = EXAMPLES[name]
    graph = on_an_own_adapter(api_graph(read_workflow(name), schemas))
    graph = fitted(graph, example.condition, example.prompt)
    if example.replaces == CHANGED:
        graph = with_picture_to_change(graph)
    example.condition.picture.save(server.base / "input" / example.condition.file)
    if example.second:
        example.second[1].save(server.base / "input" / example.replaces)
    made = [Image.fromarray(np.round(pixels * 255).astype(np.uint8)) for pixels in server.run(graph, PATIENCE_S)]
    return max(made, key=lambda one: one.width) if name in SHEETS else made[-1]


def thumbnail(name: str, made: Image.Image) -> Image.Image:
    """The reference at the left, beside it what else goes in and what comes out."""
    example = EXAMPLES[name]
    if name in SHEETS:
        return with_foot(made)
    left = Cell(enlarged(example.condition.picture), "Reference", example.condition.about)
    cells = [Cell(enlarged(example.second[1].convert("RGB")), example.second[0])] if example.second else []
    told = f"Prompt: {example.prompt or example.condition.prompt}"
    cells.append(Cell(enlarged(made), "Result", told))
    note = next(node for node in read_workflow(name)["nodes"] if node["type"] == "MarkdownNote")
    about = note["widgets_values"][0].splitlines()[0].strip("# ")
    return contact_sheet(name.replace("_", " ").capitalize(), about, [Row("", "", cells, left)], FOOT)


def with_foot(sheet: Image.Image) -> Image.Image:
    picture = ImageOps.expand(sheet, (0, 0, 0, 2 * FOOT_SIZE), "white")
    font = ImageFont.load_default(FOOT_SIZE)
    ImageDraw.Draw(picture).text((FOOT_SIZE, sheet.height + FOOT_SIZE // 3), FOOT, "black", font)
    return picture


def named_files(folder: Path) -> Path:
    """A models folder that lists every file which the workflows name; they are empty, for the page shows names only."""
    for place, names in PLACES.items():
        (folder / place).mkdir(parents=True)
        for name in names:
            (folder / place / name).touch()
    return folder


def graph_picture(page: ComfyPage, workflow: Json) -> Image.Image:
    """At the page's full scale first, since it leaves texts out at a smaller one."""
    boxes = [group["bounding"] for group in workflow["groups"]]
    size = {"width": max(x + w for x, _, w, _ in boxes), "height": max(y + h for _, y, _, h in boxes)}
    page.page.set_viewport_size({"width": size["width"] + 2 * MARGIN, "height": size["height"] + 2 * MARGIN})
    page.clear()  # so that the wait for this graph's nodes is not over at once
    page.load(workflow)
    with tempfile.TemporaryDirectory() as folder:
        return Image.open(page.graph_picture(Path(folder) / "graph.png", MARGIN)).convert("RGB")


def save(picture: Image.Image, name: str) -> None:
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    picture.save(WORKFLOWS / f"{name}.jpg", quality=QUALITY, optimize=True)


def main() -> None:
    names = sys.argv[1:] or list(GRAPHS)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(models=write_models(Path(folder))) as server:
        schemas = server.object_info()
        for name in filter(EXAMPLES.__contains__, names):
            save(thumbnail(name, result_of(server, name, schemas)), name)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(models=named_files(Path(folder) / "models")) as server:
        for picture in INPUTS.glob("*.png"):
            server.upload(picture)
        with comfy_page(server) as page:
            for name in (name for name in names if name not in EXAMPLES):
                save(graph_picture(page, read_workflow(name)), name)


if __name__ == "__main__":
    main()
