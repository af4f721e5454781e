"""A second sheet, of which nothing was chosen: `.venv/bin/python -m tools.demo.unchosen`.

The first pictures that the seeds 0, 1, 2, ... give of combinations that the adapter never saw, under every instruction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tools.host.graphs import Graph
from training.miniature.expand.write import write_models
from training.miniature.world.captions import caption
from training.miniature.world.factors import PERSON, sample

from . import conditions
from .conditions import FIVE, Condition, save_pictures
from .contact_sheet import contact_sheet
from .graphs import Demo
from .run import OUTPUT, run_demo

THINGS, PEOPLE = 5, 3
LEFT_OUT = ("subject", "colour", "style", "layout", "identity")  # for the condition to give
TITLE = "IPAdapter-Instruct: the first pictures of combinations that the adapter never saw, not chosen"
ABOUT = (
    f"The seeds 0 to {THINGS + PEOPLE - 1}: {THINGS} things and {PEOPLE} people of the small drawn world, and prompts "
    "of other pictures that say the scene alone, and a person's expression. Each row has one noise."
)
FOOT = "Run in ComfyUI by python -m tools.demo.unchosen, in all else like the chosen ones of make demo."


def condition(number: int) -> Condition:
    """That of a seed: a picture, and the scene (and expression) of another one as its prompt."""
    generator = np.random.default_rng(number)
    shown, other = (sample(generator, True, person=number >= THINGS) for _ in range(2))
    what = "a person" if shown.subject == PERSON else f"a {shown.colour} {shown.subject}"
    return Condition(f"{number}: {what}, {shown.style}", caption(other, generator, LEFT_OUT), shown)


CONDITIONS = tuple(map(condition, range(THINGS + PEOPLE)))


def demo(folder: Path) -> Demo:
    return Demo(
        about=TITLE,
        models=write_models(folder / "models"),
        workflows=(FIVE,),
        inputs=save_pictures(folder / "inputs", {one.file: one.picture for one in CONDITIONS}),
        planned=lambda graphs: [picture for one in CONDITIONS for picture in conditions.planned(one, graphs[FIVE])],
        sheet=sheet,
    )


def sheet(made: dict[str, Image.Image], graphs: dict[str, Graph]) -> Image.Image:
    return contact_sheet(TITLE, ABOUT, [conditions.row(made, one) for one in CONDITIONS], FOOT)


if __name__ == "__main__":
    run_demo(demo, OUTPUT / "unchosen.jpg")
