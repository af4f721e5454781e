"""The demo on the miniature, small models of a small drawn world: one condition a row, one instruction a column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipadapter_instruct_core.tasks import Task, phrase
from PIL import Image, ImageOps
from tools.host.graphs import Graph
from tools.workflows.files import CHECKPOINT, LORA, OPEN_CLIP, OWN_ADAPTER, PLAIN_ADAPTER, SCRIBBLE_NET
from tools.workflows.hint_pictures import SCRIBBLE
from tools.workflows.parts import NEGATIVE, REFERENCE
from tools.workflows.shipped import FIVE_SUBJECT
from training.miniature.expand.write import write_models
from training.miniature.models.controlnet import scribble
from training.miniature.world.factors import PERSON, PORTRAIT, Factors
from training.miniature.world.style import Rgb, render, render_cut_out

from .contact_sheet import CELL, Cell, Row, contact_sheet
from .graphs import Demo, Picture, renamed, saving, text_of, with_inputs

FIVE = "own_adapter_five_instructions"
WITH_SCRIBBLE, WITH_LORA = "own_adapter_style_with_scribble_controlnet", "own_adapter_composition_with_lora"
PLAIN = "plain"

# All that the miniature changes in the shipped workflows: the files' names ...
FILE_NAMES = {
    CHECKPOINT: "miniature.safetensors",
    OWN_ADAPTER: "miniature.safetensors",
    PLAIN_ADAPTER: "miniature-plain.safetensors",
    OPEN_CLIP: "miniature-clip.safetensors",
    SCRIBBLE_NET: "miniature-scribble.safetensors",
    LORA: "miniature-woodcut.safetensors",
}
# ... the size, and for each row the pictures and the words (see `fitted`).
SETTINGS = {"EmptyLatentImage": {"width": 64, "height": 64}}

TITLE = "IPAdapter-Instruct: one picture a row, one instruction a column"
WORLD = (
    "A small drawn world of 64 x 64 pixels, and small models that this project's own training code taught it. The "
    "pictures at the left combine what training never showed together."
)
DIFFERENCES = (
    "The shipped workflows own_adapter_*, run in ComfyUI by make demo. All that differs: the names of the files, the "
    "size, the pictures, the words."
)


@dataclass(frozen=True)
class Condition:
    """A picture that training never saw the like of, and the prompt that goes with it under every instruction.

    Attributes:
        square: the colour of the ground where the subject is cut out.
    """

    about: str
    prompt: str
    factors: Factors
    square: Rgb | None = None

    @property
    def name(self) -> str:
        return self.about.replace(" ", "_").replace(",", "")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("everything", "style", "composition", "face" if self.factors.subject == PERSON else "object")

    @property
    def picture(self) -> Image.Image:
        pixels = render(self.factors) if self.square is None else render_cut_out(self.factors, self.square)
        return Image.fromarray(pixels)


CONDITIONS = (
    Condition("a cat, poster", "something in the snow", Factors("cat", "poster", "upper left", "night", "yellow")),
    Condition(
        "a boat, stained glass",
        "something on a meadow",
        Factors("boat", "glass", "upper left", "desert", "teal"),
    ),
    Condition(
        "a fish, cut out",
        "something in a room, stained glass",
        Factors("fish", "dots", "large", "meadow", "teal"),
        (235, 150, 60),
    ),
    Condition(
        "a person, stained glass",
        "a surprised person at night",
        Factors(PERSON, "glass", PORTRAIT, "sea", "teal", identity=8, expression="happy", tilt=-6),
    ),
    Condition(
        "a person, poster",
        "a sleepy person in the desert",
        Factors(PERSON, "poster", PORTRAIT, "meadow", "purple", identity=11, expression="sad", tilt=8),
    ),
)
# The ControlNet's lines and style, and the layout that is taken under the LoRA.
DRAWN = Factors("house", "pencil", "near and far", "snow", "red")
DRAWN_PROMPT, LORA_PROMPT = "red houses in the snow", "a purple car in the desert"
STYLE_OF = LAYOUT_OF = CONDITIONS[1]


def miniature_demo(folder: Path) -> Demo:
    """The demo on the weights that come with the project; models and pictures are written into ``folder``."""
    conditions = {f"{condition.name}.png": condition.picture for condition in CONDITIONS}
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    for name, picture in {**conditions, SCRIBBLE: drawing()}.items():
        picture.save(inputs / name)
    return Demo(
        about="the weights are the miniature's; with released ones: make demo MODELS=/path/to/ComfyUI/models",
        models=write_models(folder / "models"),
        workflows=(FIVE, WITH_SCRIBBLE, WITH_LORA),
        inputs=sorted(inputs.iterdir()),
        planned=planned,
        sheet=sheet,
    )


def drawing() -> Image.Image:
    """Black lines on white, as people draw."""
    return ImageOps.invert(Image.fromarray(scribble(DRAWN)))


def planned(graphs: dict[str, Graph]) -> list[Picture]:
    """Each condition under plain IPAdapter+ and under each instruction, then ControlNet and LoRA."""
    pictures = [
        Picture(f"{condition.name}_{column}", saving(fitted(graphs[FIVE], condition), f"own_adapter_{column}"))
        for condition in CONDITIONS
        for column in (PLAIN, *condition.tasks)
    ]
    combined = ((WITH_SCRIBBLE, STYLE_OF, DRAWN_PROMPT), (WITH_LORA, LAYOUT_OF, LORA_PROMPT))
    return pictures + [Picture(name, fitted(graphs[name], of, words)) for name, of, words in combined]


def fitted(graph: Graph, condition: Condition, prompt: str = "") -> Graph:
    """A shipped graph with the miniature's files, size, pictures and words. It knows no word of the negative prompt."""
    texts = {REFERENCE: f"{condition.name}.png", FIVE_SUBJECT: condition.factors.subject}
    texts |= {text_of(graph): prompt or condition.prompt, NEGATIVE: ""}
    return with_inputs(renamed(graph, FILE_NAMES | texts), SETTINGS)


def sheet(made: dict[str, Image.Image], graphs: dict[str, Graph]) -> Image.Image:
    """A row for each condition, and one with ControlNet and LoRA."""
    rows = [
        Row("", "", [result(made, condition, column) for column in (PLAIN, *condition.tasks)], given(condition))
        for condition in CONDITIONS
    ]
    combined = [
        Cell(enlarged(STYLE_OF.picture), "Style from this", STYLE_OF.about),
        Cell(enlarged(drawing()), "Lines from this", "a drawing"),
        Cell(enlarged(made[WITH_SCRIBBLE]), "Style + ControlNet", f"Prompt: {text_of(graphs[WITH_SCRIBBLE])}"),
        Cell(enlarged(LAYOUT_OF.picture), "Layout from this", LAYOUT_OF.about),
        Cell(enlarged(made[WITH_LORA]), "Composition + LoRA", f"Prompt: {text_of(graphs[WITH_LORA])}"),
    ]
    about = "The ControlNet holds a drawing's lines. The LoRA makes everything a woodcut."
    return contact_sheet(TITLE, WORLD, [*rows, Row("With ControlNet and LoRA", about, combined)], DIFFERENCES)


def given(condition: Condition) -> Cell:
    return Cell(
        enlarged(condition.picture), condition.about[:1].upper() + condition.about[1:], f"Prompt: {condition.prompt}"
    )


def result(made: dict[str, Image.Image], condition: Condition, column: str) -> Cell:
    picture = enlarged(made[f"{condition.name}_{column}"])
    if column == PLAIN:
        return Cell(picture, "Plain IPAdapter+", "reads no instruction")
    return Cell(picture, column.capitalize(), f"“{phrase(Task(column), condition.factors.subject)}”")


def enlarged(picture: Image.Image) -> Image.Image:
    """Every pixel a square: a smooth picture would hide how small it is."""
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST)
