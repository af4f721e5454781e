"""Tasks: their wordings are told apart, and their settings are the reference code's (FACTS section 3)."""

from __future__ import annotations

import re

import pytest
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.tasks import PHRASES, GuidanceMode, Task, defaults, phrase

SIMPLE, THREE_WAY = GuidanceMode.SIMPLE, GuidanceMode.THREE_WAY
KEYWORD = {
    Task.EVERYTHING: r"everything",
    Task.STYLE: r"style|stylistic",
    Task.COMPOSITION: r"composition",
    Task.OBJECT: r"object",
    Task.FACE: r"face",
    Task.COLOUR: r"colou?rs?",
    Task.POSE: r"poses?",
    Task.FOREGROUND: r"foreground",
    Task.BACKGROUND: r"background",
}


@pytest.mark.parametrize("task", Task)
def test_a_task_has_wordings_of_its_own(task: Task) -> None:
    assert len(set(PHRASES[task])) == len(PHRASES[task]) >= 3
    for words in PHRASES[task]:
        named = [other for other in Task if re.search(rf"\b({KEYWORD[other]})\b", words, re.IGNORECASE)]
        assert set(named) <= {task}, f"{words!r} names {named}"


@pytest.mark.parametrize("task", Task)
def test_the_first_wording_is_the_one_the_released_weights_saw(task: Task) -> None:
    everything = "use everything from the image"
    assert phrase(task) == (everything if task is Task.EVERYTHING else f"use the {task.value}")


def test_the_subject_takes_the_objects_place_and_no_others() -> None:
    assert phrase(Task.OBJECT, "red teapot") == "use the red teapot"
    assert phrase(Task.STYLE, "red teapot") == "use the style"


# weight, guidance, instruct scale, image scale
SD15 = {
    Task.EVERYTHING: (0.8, SIMPLE, 2.0, 1.0),
    Task.STYLE: (0.8, SIMPLE, 2.0, 1.0),
    Task.COMPOSITION: (0.6, THREE_WAY, 2.0, 1.0),
    Task.OBJECT: (0.8, THREE_WAY, 2.0, 1.0),
    Task.FACE: (0.8, SIMPLE, 2.0, 1.0),
    Task.COLOUR: (0.8, SIMPLE, 2.0, 1.0),
    Task.POSE: (0.6, THREE_WAY, 2.0, 1.0),
    Task.FOREGROUND: (0.8, THREE_WAY, 2.0, 1.0),
    Task.BACKGROUND: (0.8, THREE_WAY, 2.0, 1.0),
}
SDXL = {
    Task.EVERYTHING: (0.9, SIMPLE, 4.0, 0.5),
    Task.STYLE: (0.9, SIMPLE, 4.0, 0.5),
    Task.COMPOSITION: (0.7, THREE_WAY, 6.0, 0.5),
    Task.OBJECT: (0.9, THREE_WAY, 6.0, 0.5),
    Task.FACE: (0.9, SIMPLE, 4.0, 0.5),
    Task.COLOUR: (0.9, SIMPLE, 4.0, 0.5),
    Task.POSE: (0.7, THREE_WAY, 4.0, 0.5),
    Task.FOREGROUND: (0.9, THREE_WAY, 4.0, 0.5),
    Task.BACKGROUND: (0.9, THREE_WAY, 6.0, 0.5),
}
# Their SD3 pipeline takes nothing off any task's weight, and guides a face three ways.
SD3 = {task: (0.8, SIMPLE if task.value in ("everything", "style", "colour") else THREE_WAY, 6.0, 1.0) for task in Task}


@pytest.mark.parametrize("task", Task)
def test_settings_are_the_reference_codes(task: Task) -> None:
    for base, table in ((Base.SD15, SD15), (Base.SDXL, SDXL), (Base.SD3, SD3)):
        found = defaults(task, base)
        assert (found.weight, found.guidance, found.instruct_scale, found.image_scale) == table[task], base
