"""What the miniature's demo shows: pictures the like of which the adapter never saw, their prompts, their rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ipadapter_instruct_core.tasks import Task, phrase
from PIL import Image
from tools.host.graphs import Graph, node
from tools.workflows.all_instructions import FIVE_SUBJECT
from tools.workflows.files import ADAPTER, CHECKPOINT, LORA, OPEN_CLIP, OWN_ADAPTER, PLAIN_ADAPTER, SCRIBBLE_NET
from tools.workflows.parts import NEGATIVE, REFERENCE
from training.miniature.world.factors import PERSON, PORTRAIT, Factors
from training.miniature.world.style import Rgb, render, render_cut_out

from .contact_sheet import CELL, Cell, Row
from .graphs import Picture, renamed, saving, text_of, with_inputs

FIVE = "own_adapter_five_instructions"
PLAIN = "plain"

# All that the miniature changes in the shipped workflows: the files' names ...
FILE_NAMES = {
    CHECKPOINT: "miniature.safetensors",
    ADAPTER: "miniature.safetensors",
    OWN_ADAPTER: "miniature.safetensors",
    PLAIN_ADAPTER: "miniature-plain.safetensors",
    OPEN_CLIP: "miniature-clip.safetensors",
    SCRIBBLE_NET: "miniature-scribble.safetensors",
    LORA: "miniature-woodcut.safetensors",
}
# ... the size, and for each row the pictures and the words (see `fitted`).
SETTINGS = {"EmptyLatentImage": {"width": 64, "height": 64}}


@dataclass(frozen=True)
class Condition:
    """A picture the like of which the adapter never saw, and the prompt that goes with it under every instruction.

    Attributes:
        square: the colour of the ground where the subject is cut out.
    """

    about: str
    prompt: str
    factors: Factors
    square: Rgb | None = None

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.about)

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("everything", "style", "composition", "face" if self.factors.subject == PERSON else "object")

    @property
    def picture(self) -> Image.Image:
        pixels = render(self.factors) if self.square is None else render_cut_out(self.factors, self.square)
        return Image.fromarray(pixels)

    @property
    def file(self) -> str:
        return f"{self.name}.png"


CONDITIONS = (
    Condition("a cat, poster", "something in the snow", Factors("cat", "poster", "upper left", "meadow", "yellow")),
    Condition(
        "a boat, stained glass",
        "something on a meadow",
        Factors("boat", "glass", "upper left", "desert", "teal"),
    ),
    Condition(
        "a person, stained glass",
        "a sad person on a meadow",
        Factors(PERSON, "glass", PORTRAIT, "sea", "teal", identity=8, expression="happy", tilt=-6),
    ),
    Condition(
        "a person, poster",
        "a happy person by the sea",
        Factors(PERSON, "poster", PORTRAIT, "meadow", "purple", identity=11, expression="sad", tilt=8),
    ),
)
CAT, BOAT, OLD_WOMAN, _ = CONDITIONS
FISH = Condition(
    "a fish, cut out",
    "something in a room, stained glass",
    Factors("fish", "dots", "large", "meadow", "teal"),
    (235, 150, 60),
)
TREE = Condition("a tree, watercolour", "something at night", Factors("tree", "watercolour", "large", "meadow", "red"))
DRAWN = Condition("houses, pencil", "", Factors("house", "pencil", "near and far", "snow", "red"))


def save_pictures(folder: Path, pictures: dict[str, Image.Image]) -> list[Path]:
    """What the graphs load, by file name."""
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    return sorted(folder.iterdir())


def planned(condition: Condition, graph: Graph) -> list[Picture]:
    """A condition under plain IPAdapter+ and under each instruction."""
    graph = fitted(graph, condition)
    pictures = [Picture(f"{condition.name}_{PLAIN}", saving(graph, "own_adapter_plain"))]
    for column in condition.tasks:
        ticks = {task.value: task.value == column for task in Task}
        one = saving(with_inputs(graph, {"IPAdapterInstructAllTasks": ticks}), "own_adapter")
        pictures.append(Picture(f"{condition.name}_{column}", one))
    return pictures


def fitted(graph: Graph, condition: Condition, prompt: str = "") -> Graph:
    """A shipped graph with the miniature's files, size, pictures and words. It knows no word of the negative prompt."""
    texts = {REFERENCE: condition.file, FIVE_SUBJECT: condition.factors.subject, NEGATIVE: ""}
    if any(entry["class_type"] == "KSampler" for entry in graph.values()):
        texts[text_of(graph)] = prompt or condition.prompt
    return with_inputs(renamed(graph, FILE_NAMES | texts), SETTINGS)


def on_an_own_adapter(graph: Graph) -> Graph:
    """A graph for the released adapter as one for an adapter whose pictures and instructions OpenCLIP reads."""
    readers = [name for name, entry in graph.items() if entry["class_type"] == "CLIPVisionLoader"]
    for reader in readers:
        graph = graph | {reader: node("IPAdapterInstructOpenCLIPLoader", model_name=OPEN_CLIP)}
        for name, entry in graph.items():
            if "negative_prompt" in entry["inputs"]:
                inputs = entry["inputs"] | {"clip": [reader, 0], "prompt_clip": entry["inputs"]["clip"]}
                graph = graph | {name: {**entry, "inputs": inputs}}
    return graph


def row(made: dict[str, Image.Image], condition: Condition) -> Row:
    """The condition at the left, and what was made of it."""
    about = condition.about[:1].upper() + condition.about[1:]
    left = Cell(enlarged(condition.picture), about, f"Prompt: {condition.prompt}")
    return Row("", "", [result(made, condition, column) for column in (PLAIN, *condition.tasks)], left)


def result(made: dict[str, Image.Image], condition: Condition, column: str) -> Cell:
    picture = enlarged(made[f"{condition.name}_{column}"])
    if column == PLAIN:
        return Cell(picture, "Plain IPAdapter+", "reads no instruction")
    return Cell(picture, column.capitalize(), f"“{phrase(Task(column), condition.factors.subject)}”")


def enlarged(picture: Image.Image) -> Image.Image:
    """Every pixel a square: a smooth picture would hide how small it is."""
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST)
