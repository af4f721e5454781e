"""The miniature's rows on references as things of their own: two roles, not this style, where it looked."""

from __future__ import annotations

from ipadapter_instruct_core.tasks import Task, phrase
from PIL import Image
from tools.host.graphs import Graph
from tools.workflows.hint_pictures import SCRIBBLE
from tools.workflows.parts import NEGATIVE, REFERENCE

from .conditions import BOAT, DRAWN, FILE_NAMES, SETTINGS, TREE, Condition, enlarged, on_an_own_adapter
from .contact_sheet import Cell, Row
from .graphs import Picture, renamed, with_inputs

ROLES, NOT_STYLE, LOOKED = "two_references_two_roles", "not_this_style", "where_it_looked"
EXCHANGED, WITH_STYLE = f"{ROLES}_exchanged", f"{NOT_STYLE}_but_with_it"
ROLES_PROMPT = "a red mushroom by the sea"
LOOKED_AT = ("everything", "style", "composition", "object")
AWAY = "The picture is given once more, as a style to keep away from. Not every picture changes its style by it."
SHEET_GAP = 12  # pixels around the pictures of Show Where It Looked


def on_miniature(graph: Graph, names: dict[str, str]) -> Graph:
    """A graph for the released weights, whose instructions the checkpoint's CLIP reads, with the small OpenCLIP for it.

    Args:
        names: pictures and words in place of the shipped ones.
    """
    return with_inputs(renamed(on_an_own_adapter(graph), FILE_NAMES | {NEGATIVE: ""} | names), SETTINGS)


def with_prompt(graph: Graph, prompt: str) -> Graph:
    return with_inputs(graph, {"IPAdapterInstructEncode": {"prompt": prompt}})


def planned(graphs: dict[str, Graph]) -> list[Picture]:
    """Both roles each way, everything with and without its style, and the sheet of what was looked at."""

    def roles(style: Condition, layout: Condition) -> Graph:
        # The small world's portraits have one layout alone: it is the style, not the face, that is taken.
        names = {REFERENCE: style.file, SCRIBBLE: layout.file, "face": "style"}
        return with_prompt(on_miniature(graphs[ROLES], names), ROLES_PROMPT)

    without = with_prompt(on_miniature(graphs[NOT_STYLE], {REFERENCE: TREE.file}), TREE.prompt)
    everything = {
        name: {**entry, "inputs": {key: value for key, value in entry["inputs"].items() if key != "negative_reference"}}
        for name, entry in without.items()
    }
    ticks = {task.value: task.value in LOOKED_AT for task in Task}
    looked = on_miniature(graphs[LOOKED], {REFERENCE: BOAT.file})
    return [
        Picture(ROLES, roles(BOAT, DRAWN)),
        Picture(EXCHANGED, roles(DRAWN, BOAT)),
        Picture(WITH_STYLE, everything),
        Picture(NOT_STYLE, without),
        Picture(
            LOOKED,
            with_inputs(looked, {"IPAdapterInstructAllTasks": {"subject": BOAT.factors.subject, **ticks}}),
        ),
    ]


def rows(made: dict[str, Image.Image]) -> list[Row]:
    one, other = (Cell(enlarged(condition.picture), condition.about.capitalize()) for condition in (BOAT, DRAWN))
    roles = [
        one,
        other,
        Cell(enlarged(made[ROLES]), "Style of the boat", f"layout of the houses. Prompt: {ROLES_PROMPT}"),
        Cell(enlarged(made[EXCHANGED]), "Style of the houses", "layout of the boat; the same prompt and seed"),
    ]
    prompt = f"Prompt: {TREE.prompt}"
    kept = [
        Cell(enlarged(TREE.picture), TREE.about.capitalize(), "a combination that training has shown"),
        Cell(enlarged(made[WITH_STYLE]), "Everything", prompt),
        Cell(enlarged(made[NOT_STYLE]), "Everything, not this style", prompt),
    ]
    names = ("What was read", *(task.capitalize() for task in LOOKED_AT))
    words = ("", *(f"“{phrase(Task(task), BOAT.factors.subject)}”" for task in LOOKED_AT))
    maps = [Cell(*cell) for cell in zip(cut(made[LOOKED], len(names)), names, words, strict=True)]
    return [
        Row("Two references in two roles", "The roles are exchanged in the last picture.", roles),
        Row("Not this style", AWAY, kept),
        Row("Where it looked", "From black over red to white. It tells what was read, not what came of it.", maps),
    ]


def cut(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The pictures of a sheet of one row, without the words below them."""
    pitch = (sheet.width - SHEET_GAP) // count
    side = pitch - SHEET_GAP
    lefts = [SHEET_GAP + place * pitch for place in range(count)]
    return [sheet.crop((left, SHEET_GAP, left + side, SHEET_GAP + side)) for left in lefts]
