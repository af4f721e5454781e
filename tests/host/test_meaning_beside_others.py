"""What the pictures mean beside a ControlNet and a LoRA: the miniature in the real host, judged by its oracle.

More pictures, and the figures in print: MEANING_CASES=100 pytest -rP tests/host/test_meaning_beside_others.py
"""

from __future__ import annotations

import pytest
from ipadapter_instruct_core.tasks import Task
from meaning import CASES, SEED, cases_of, check, reworded
from small_world import SmallWorld
from training.miniature.judged.cases import Case, task_cases
from training.miniature.models.controlnet import scribble
from training.miniature.world.factors import PERSON
from training.miniature.world.samples import LEFT_TO_CONDITION


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
