"""How alike the small CLIP reads the tasks' instructions, as the page has it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from ipadapter_instruct_core.tasks import Task
from training.miniature.judged import wordings
from training.miniature.models import clip
from training.miniature.world.samples import TASKS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "miniature" / "README.md").read_text()


def test_cosines_are_those_of_means_of_hidden_states_and_those_of_the_page() -> None:
    model = clip.load()
    found = wordings.cosines(model, 200)
    one, other = (model.instruction_tokens([f"use the {word}"])[0].mean(dim=0) for word in ("style", "object"))
    expected = torch.dot(one, other) / (one.norm() * other.norm())
    assert abs(found[Task.STYLE, Task.OBJECT][0] - float(expected)) < 1e-4
    rows = PAGE.split("cosine of the means")[1].split("\n\n")[0].replace("*", "")
    told = [tuple(map(float, pair)) for pair in re.findall(r"(-?\d\.\d\d) / (-?\d\.\d\d)", rows)]
    places = [(one, other) for place, one in enumerate(TASKS) for other in TASKS[place + 1 :]]
    assert len(told) == 10 and list(found) == places
    for pair, values in zip(places, told, strict=True):
        assert all(abs(value - is_) <= 0.011 for value, is_ in zip(values, found[pair], strict=True)), pair
