"""What the pictures mean: a small sample of the miniature's table through the real host, judged by its oracle.

The pictures are of combinations that training has shown: there a whole adapter does as it is told nearly each time, and
a broken one by chance alone, so that few of them tell the two apart. The floors and ceilings lie between; the breakages
below show it. What it does on combinations that its training never saw, docs/miniature says.
More pictures, and the figures in print: MEANING_CASES=100 pytest -rP tests/host/test_meaning.py -k pictures_take
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection

import inside
import pytest
import torch
from ipadapter_instruct_core.tasks import Task, phrase
from meaning import CASES, SEED, cases_of, check, reworded
from small_world import SmallWorld
from training.miniature.judged.cases import crossed_cases, task_cases

run_module = importlib.import_module(f"{inside.PACK}.nodes.host.run")

# The adapter's layers, in the order of its file: down, up, middle.
OUTER, LOWER, MIDDLE = (0, 4, 5), (1, 2, 3), 6
# By task: at least this share of the pictures should show what the condition or the prompt gives ...
FLOORS = {
    Task.EVERYTHING: {"condition subject": 0.7, "condition style": 0.7, "condition layout": 0.7},
    Task.STYLE: {"condition style": 0.7, "prompt subject": 0.7, "prompt scene": 0.7},
    Task.COMPOSITION: {"condition layout": 0.7, "prompt subject": 0.7, "prompt style": 0.7, "prompt scene": 0.7},
    Task.OBJECT: {"condition subject": 0.7, "condition colour": 0.7, "prompt style": 0.7, "prompt scene": 0.7},
    Task.FACE: {"condition identity": 0.7, "prompt expression": 0.7, "prompt style": 0.7, "prompt scene": 0.7},
}
# ... and at most this share what the condition shows beside it.
CEILINGS = {
    Task.EVERYTHING: {},
    Task.STYLE: {"condition subject": 0.2, "condition scene": 0.2, "condition layout": 0.2},
    Task.COMPOSITION: {"condition subject": 0.2, "condition style": 0.2, "condition scene": 0.2},
    Task.OBJECT: {"background": 0.2, "condition style": 0.2},
    Task.FACE: {"condition expression": 0.2, "condition style": 0.2, "condition scene": 0.2},
}


def check_task(world: SmallWorld, task: Task) -> None:
    check(world.rates(cases_of(task)), FLOORS[task], CEILINGS[task])


@pytest.mark.parametrize("task", FLOORS)
def test_pictures_take_what_the_instruction_says_and_the_rest_from_the_prompt(world: SmallWorld, task: Task) -> None:
    check_task(world, task)


def shuffle_weights(world: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in world.adapter.adapter.parameters():
        weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))


def swap_the_rows(world: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture in the negative row and nothing in the positive one."""
    monkeypatch.setattr(run_module, "POSITIVE_LISTS", ("negative",))


def kill_the_middle_layers(world: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the lower of the UNet's two levels; the middle block's alone would not be missed (see below)."""
    silence(world, (*LOWER, MIDDLE))


def silence(world: SmallWorld, layers: Collection[int]) -> None:
    for number, layer in enumerate(world.adapter.adapter.ip_adapter.values()):
        if number in layers:
            layer.to_v_ip.weight.zero_()


@pytest.mark.parametrize(
    ("breakage", "task", "figure"),
    [
        (shuffle_weights, Task.EVERYTHING, "condition subject.*condition style.*condition layout"),
        (shuffle_weights, Task.STYLE, "condition style"),
        (shuffle_weights, Task.COMPOSITION, "condition layout"),
        (shuffle_weights, Task.OBJECT, "condition colour"),
        (shuffle_weights, Task.FACE, "condition identity"),
        (kill_the_middle_layers, Task.COMPOSITION, "condition layout"),
        (kill_the_middle_layers, Task.FACE, "condition identity"),
        (swap_the_rows, Task.COMPOSITION, "condition layout"),
        (swap_the_rows, Task.FACE, "condition identity"),
    ],
)
def test_a_broken_adapter_is_found_out(
    world: SmallWorld, monkeypatch: pytest.MonkeyPatch, breakage: Callable, task: Task, figure: str
) -> None:
    breakage(world, monkeypatch)
    with pytest.raises(AssertionError, match=figure):
        check_task(world, task)


def check_the_instruction(world: SmallWorld) -> None:
    """The prompts say neither style nor layout, and nothing but the instruction differs between the two pictures.

    Under the tasks' own prompts an ignored instruction does not show: they say all that the task leaves alone, and over
    "everything" the prompt wins too.
    """
    style, layout = (
        world.rates(reworded(crossed_cases(False, task, CASES, SEED, "whole"), ("style", "layout")))
        for task in (Task.STYLE, Task.COMPOSITION)
    )
    for figure, more, less in (("condition style", style, layout), ("condition layout", layout, style)):
        print(f"{figure}: {more[figure]} where it is asked for, else {less[figure]}")
        assert more[figure].share - less[figure].share > 0.4, figure


def test_the_instruction_decides(world: SmallWorld) -> None:
    check_the_instruction(world)


def test_an_ignored_instruction_is_found_out(world: SmallWorld) -> None:
    world.instruction = phrase(Task.EVERYTHING)
    with pytest.raises(AssertionError, match="condition style"):
        check_the_instruction(world)


def test_three_way_guidance_takes_it_too(world: SmallWorld) -> None:
    """In so few steps it follows prompts less; what it takes is what counts here."""
    world.guidance = "three-way"
    check(world.rates(cases_of(Task.COMPOSITION)), {"condition layout": 0.7})


def test_the_middle_block_knows_faces_by_itself(world: SmallWorld) -> None:
    """Its slot has a key of its own kind, and the other layers make up for it where it is dead. Alone it knows
    about half of the faces, which takes many to tell; with it dead too one in sixteen comes by chance, and fewer tell
    that."""
    cases, floors = task_cases(Task.FACE, 4 * CASES, SEED, held_out=False), {"condition identity": 0.5}
    silence(world, (*OUTER, *LOWER))
    world.strength = 2.0
    check(world.rates(cases), floors)
    silence(world, (MIDDLE,))
    with pytest.raises(AssertionError, match="condition identity"):
        check(world.rates(cases[: 2 * CASES]), floors)
