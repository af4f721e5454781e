"""What the pictures mean: a small sample of the miniature's table through the real host, judged by its oracle.

The pictures are of combinations that training has shown: there a whole adapter does as it is told nearly each time, and
a broken one by chance alone, so that few of them tell the two apart. The floors and ceilings lie between; the breakages
below show it. What it does on combinations that its training never saw, docs/miniature says.
More pictures, and the figures in print: MEANING_CASES=100 pytest -rP tests/host/test_meaning.py -k pictures_take
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

import inside
import numpy as np
import pytest
import torch
from ipadapter_instruct_core.tasks import Task, phrase
from small_world import SmallWorld
from training.miniature.expand.write import write_models
from training.miniature.judged.cases import Case, Rate, crossed_cases, task_cases
from training.miniature.models.controlnet import scribble
from training.miniature.world.captions import caption
from training.miniature.world.factors import PERSON
from training.miniature.world.samples import LEFT_TO_CONDITION

run_module = importlib.import_module(f"{inside.PACK}.nodes.host.run")

CASES, SEED = int(os.environ.get("MEANING_CASES", "4")), 2
STEPS = 8  # of the sampler: with fewer, prompts are not followed either
# The adapter's layers, in the order of its file: down, up, middle.
OUTER, LOWER, MIDDLE = (0, 4, 5), (1, 2, 3), 6
COLOURED = ("poster", "watercolour", "glass", "dots")  # styles that fill a thing with its own colour
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


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    with torch.inference_mode():
        return SmallWorld(write_models(tmp_path_factory.mktemp("miniature")), STEPS)


@pytest.fixture
def world(loaded: SmallWorld) -> SmallWorld:
    loaded.renew()
    return loaded


def check(found: dict[str, Rate], floors: dict[str, float], ceilings: dict[str, float] = {}) -> None:
    """Fails with the figures that miss their bounds."""
    print(", ".join(f"{name} {found[name].hits} of {found[name].total}" for name in (*floors, *ceilings)))
    missed = [f"{name} {found[name]} < {bound}" for name, bound in floors.items() if found[name].share < bound]
    missed += [f"{name} {found[name]} > {bound}" for name, bound in ceilings.items() if found[name].share > bound]
    assert not missed, "; ".join(missed)


def check_task(world: SmallWorld, task: Task) -> None:
    check(world.rates(cases_of(task)), FLOORS[task], CEILINGS[task])


def cases_of(task: Task) -> list[Case]:
    """Pictures of everything get no prompt: what it says would be in them without an adapter too. Objects are of one
    kind, which the instruction names, so that they are sampled together."""
    if task is not Task.OBJECT:
        return task_cases(task, CASES, SEED, prompted=task is not Task.EVERYTHING, held_out=False)
    cases = [case for case in task_cases(task, 32 * CASES, SEED, held_out=False) if case.target.style in COLOURED]
    (subject, _), *_ = Counter(case.subject for case in cases).most_common()
    return [case for case in cases if case.subject == subject][:CASES]


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


def reworded(cases: list[Case], unsaid: tuple[str, ...], **target: str) -> list[Case]:
    """The cases with prompts that leave more out, and targets that somebody else is to see to."""
    return [
        replace(
            case,
            prompt=caption(case.target, np.random.default_rng(case.seed), unsaid),
            target=replace(case.target, **target),
        )
        for case in cases
    ]


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
    """Its slot has a key of its own kind, and the other layers make up for it where it is dead. Alone it knows a
    little over half of the faces, and with it dead too one in sixteen comes by chance."""
    cases, floors = task_cases(Task.FACE, 4 * CASES, SEED, held_out=False), {"condition identity": 0.5}
    silence(world, (*OUTER, *LOWER))
    world.strength = 2.0
    check(world.rates(cases), floors)
    silence(world, (MIDDLE,))
    with pytest.raises(AssertionError, match="condition identity"):
        check(world.rates(cases), floors)


def test_the_layout_comes_from_a_controlnet_and_the_style_from_the_condition(world: SmallWorld) -> None:
    pool = task_cases(Task.STYLE, 4 * CASES, SEED, held_out=False)
    cases = reworded([case for case in pool if case.target.subject != PERSON][:CASES], ("style", "layout"))
    hints = [scribble(case.target) for case in cases]
    layout, style = {"prompt layout": 0.7}, {"condition style": 0.7}
    check(world.rates(cases, hints=hints), layout | style | {"prompt subject": 0.7, "prompt scene": 0.7})
    with pytest.raises(AssertionError, match="prompt layout"):
        check(world.rates(cases), layout)
    with pytest.raises(AssertionError, match="condition style"):
        check(world.rates(cases, hints=hints, adapted=False), style)


LORA = {Task.COMPOSITION: "condition layout", Task.OBJECT: "condition subject"}
WOODCUT, TAKEN = {"prompt style": 0.7}, 0.7


def woodcuts(task: Task) -> list[Case]:
    return reworded(cases_of(task), ("style", *LEFT_TO_CONDITION[task]), style="woodcut")


@pytest.mark.parametrize("task", LORA)
def test_the_style_comes_from_a_lora_and_the_rest_from_the_condition(world: SmallWorld, task: Task) -> None:
    check(world.rates(woodcuts(task), model=world.with_lora()), WOODCUT | {LORA[task]: TAKEN})


def test_without_the_lora_or_the_adapter_its_part_is_missing(world: SmallWorld) -> None:
    cases, figure = woodcuts(Task.COMPOSITION), LORA[Task.COMPOSITION]
    with pytest.raises(AssertionError, match="prompt style"):
        check(world.rates(cases), WOODCUT)
    with pytest.raises(AssertionError, match=figure):
        check(world.rates(cases, model=world.with_lora(), adapted=False), {figure: TAKEN})
