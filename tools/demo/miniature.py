"""The demo on the miniature, small models of a small drawn world: one condition a row, one instruction a column."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps
from tools.host.graphs import Graph
from tools.workflows.hint_pictures import SCRIBBLE
from training.miniature.expand.write import write_models
from training.miniature.models.controlnet import scribble

from . import conditions, references
from .conditions import BOAT, CONDITIONS, DRAWN, FIVE, TREE, enlarged, fitted, save_pictures
from .contact_sheet import Cell, Row, contact_sheet
from .graphs import Demo, Picture, text_of

WITH_SCRIBBLE, WITH_LORA = "own_adapter_style_with_scribble_controlnet", "own_adapter_composition_with_lora"
TITLE = "IPAdapter-Instruct: one picture a row, one instruction a column"
WORLD = (
    "A small drawn world of 64 x 64 pixels, and small models that this project's own training code taught it. The "
    "pictures at the left combine what the adapter's training never showed together; they were chosen."
)
DIFFERENCES = (
    "Shipped workflows, run in ComfyUI by make demo. All that differs: the names of the files, the size, the pictures, "
    "the words; below the LoRA, who reads the instructions, and a style in place of a face."
)
# The ControlNet's lines and style, and the layout that is taken under the LoRA.
DRAWN_PROMPT, LORA_PROMPT = "red houses in the snow", "a purple car in the desert"
STYLE_OF = LAYOUT_OF = BOAT


def miniature_demo(folder: Path) -> Demo:
    """The demo on the weights that come with the project; models and pictures are written into ``folder``."""
    pictures = {condition.file: condition.picture for condition in (*CONDITIONS, TREE, DRAWN)}
    return Demo(
        about="the weights are the miniature's; with released ones: make demo MODELS=/path/to/ComfyUI/models",
        models=write_models(folder / "models"),
        workflows=(FIVE, WITH_SCRIBBLE, WITH_LORA, references.ROLES, references.NOT_STYLE, references.LOOKED),
        inputs=save_pictures(folder / "inputs", {**pictures, SCRIBBLE: drawing()}),
        planned=planned,
        sheet=sheet,
    )


def drawing() -> Image.Image:
    """Black lines on white, as people draw."""
    return ImageOps.invert(Image.fromarray(scribble(DRAWN.factors)))


def planned(graphs: dict[str, Graph]) -> list[Picture]:
    """Each condition under plain IPAdapter+ and under each instruction, then ControlNet and LoRA, then references."""
    pictures = [picture for condition in CONDITIONS for picture in conditions.planned(condition, graphs[FIVE])]
    combined = ((WITH_SCRIBBLE, STYLE_OF, DRAWN_PROMPT), (WITH_LORA, LAYOUT_OF, LORA_PROMPT))
    pictures += [Picture(name, fitted(graphs[name], of, words)) for name, of, words in combined]
    return pictures + references.planned(graphs)


def sheet(made: dict[str, Image.Image], graphs: dict[str, Graph]) -> Image.Image:
    """A row for each condition, one with ControlNet and LoRA, and those on references."""
    rows = [conditions.row(made, condition) for condition in CONDITIONS]
    combined = [
        Cell(enlarged(STYLE_OF.picture), "Style from this", STYLE_OF.about),
        Cell(enlarged(drawing()), "Lines from this", "a drawing"),
        Cell(enlarged(made[WITH_SCRIBBLE]), "Style + ControlNet", f"Prompt: {text_of(graphs[WITH_SCRIBBLE])}"),
        Cell(enlarged(LAYOUT_OF.picture), "Layout from this", LAYOUT_OF.about),
        Cell(enlarged(made[WITH_LORA]), "Composition + LoRA", f"Prompt: {text_of(graphs[WITH_LORA])}"),
    ]
    about = "The ControlNet holds a drawing's lines. The LoRA makes everything a woodcut."
    rows += [Row("With ControlNet and LoRA", about, combined), *references.rows(made)]
    return contact_sheet(TITLE, WORLD, rows, DIFFERENCES)
