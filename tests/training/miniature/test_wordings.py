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
    places = [(one, other) for place, one in enumerate(TASKS) for other in TASKS[place + 1 :]]
    assert list(found) == places
    told = re.search(r"at most (-?\d\.\d\d) between the fixed wordings and (-?\d\.\d\d) between the bank's", PAGE)
    assert told
    for value, values in zip(told.groups(), zip(*found.values(), strict=True), strict=True):
        assert abs(float(value) - max(values)) <= 0.011
