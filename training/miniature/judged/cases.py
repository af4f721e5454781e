"""Tests of adapters on held-out combinations: a condition, a prompt, what the picture should take from which.

cases = task_cases(Task.STYLE, count=500, seed=0)     pictures are made of each case's picture, prompt, task ...
rates = score(cases, pictures, oracle.load())         {"condition style": Rate(hits, total), "prompt scene": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from ipadapter_instruct_core.tasks import Task
from torch import Tensor
from training.miniature.models.oracle import CLASSES, COLOURLESS, UNKNOWN, Oracle, judge, labels
from training.miniature.world.captions import PARTS, caption
from training.miniature.world.factors import PERSON, Factors, sample
from training.miniature.world.samples import LEFT_TO_CONDITION, TASKS, Pair, pair
from training.miniature.world.style import render

# What each task takes from the condition.
WANTED: dict[Task, tuple[str, ...]] = {
    Task.EVERYTHING: tuple(CLASSES),
    Task.STYLE: ("style",),
    Task.OBJECT: ("subject", "colour"),
    Task.COMPOSITION: ("layout",),
    Task.FACE: ("identity",),
}
REPLICATED = ("subject", "style", "layout")  # what makes a picture a replica when all of them agree
OF_THINGS = ("subject", "style", "layout", "scene", "colour")
OF_PEOPLE = ("identity", "expression", "style", "scene", "colour")
Z = 1.959964  # of a 95 % interval
BACKGROUND_SHARE, BACKGROUND_RANGE = 1 / 3, 32 / 255


class Rate(NamedTuple):
    """How many of ``total`` pictures are so."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        share, count = self.share, self.total
        middle = share + Z * Z / (2 * count)
        half = Z * sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
        below, above = ((middle + sign * half) / (1 + Z * Z / count) for sign in (-1, 1))
        return max(below, 0.0), min(above, 1.0)


def difference(one: Rate, other: Rate) -> tuple[float, float, float]:
    """``one - other`` and Newcombe's 95 % interval of it, as if the two had seen different conditions."""
    (low, high), (other_low, other_high) = one.interval, other.interval
    found = one.share - other.share
    below = sqrt((one.share - low) ** 2 + (other_high - other.share) ** 2)
    above = sqrt((high - one.share) ** 2 + (other.share - other_low) ** 2)
    return found, found - below, found + above


@dataclass(frozen=True)
class Case:
    """One picture to make.

    Attributes:
        picture: the condition, [64, 64, 3] uint8, which shows the factors of ``condition``.
        target: what the prompt was written from; of it the prompt says the factors ``said``.
        subject: the word that an object instruction names, "" for none.
        seed: of the noise.
        cut_out: the condition is the subject alone, large on a square of one colour, without a scene.
        watched: more factors of the condition to count, whatever task and prompt speak of.
    """

    task: Task
    picture: np.ndarray
    prompt: str
    condition: Factors
    target: Factors
    said: tuple[str, ...]
    subject: str
    seed: int
    cut_out: bool = False
    watched: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """The factors that the picture should take from the condition."""
        return WANTED[self.task]

    @property
    def unwanted(self) -> tuple[str, ...]:
        """Factors of the condition that must not leak: the prompt says another value."""
        hidden = (*self.wanted, *(("scene",) if self.cut_out else ()))
        return tuple(
            name
            for name in self.said
            if name not in hidden and getattr(self.condition, name) != getattr(self.target, name)
        )


def said_by_prompt(target: Factors, left_out: Sequence[str]) -> tuple[str, ...]:
    """The factors that a caption without ``left_out`` says of a picture."""
    left = {*left_out, *(("colour",) if "subject" in left_out else ())}
    left |= {"layout"} if target.subject == PERSON else {"identity", "expression"}  # portraits have but one layout
    return tuple(part for part in PARTS if part not in left)


@cache
def _pairs(task: Task, count: int, seed: int, held_out: bool) -> list[Pair]:
    place = TASKS.index(task)
    return [pair(task, np.random.default_rng([seed, place, number]), held_out) for number in range(count)]


def task_cases(
    task: Task, count: int, seed: int = 0, prompted: bool = True, named: bool = True, held_out: bool = True
) -> list[Case]:
    """Pairs of one task as it is trained; each depends on the seed and its number alone.

    Args:
        held_out: False: new pictures of combinations that training has shown.
        prompted: False: the prompts are empty.
        named: False: object instructions do not say which object.
    """
    return [
        Case(
            task,
            one.condition_picture,
            one.prompt if prompted else "",
            replace(one.condition, layout="large") if task is Task.OBJECT else one.condition,
            one.target,
            said_by_prompt(one.target, one.left_out) if prompted else (),
            one.condition.subject if named and task is Task.OBJECT else "",
            seed * 1_000_003 + number,
            cut_out=task is Task.OBJECT,
        )
        for number, one in enumerate(_pairs(task, count, seed, held_out))
    ]


@cache
def _crossings(person: bool, count: int, seed: int) -> list[tuple[Factors, Factors, np.ndarray]]:
    """Conditions and targets that agree in nothing, and the conditions' pictures."""
    found = []
    for number in range(count):
        generator = np.random.default_rng([seed, len(TASKS) + person, number])
        target = condition = sample(generator, True, person)
        while any(getattr(condition, name) == getattr(target, name) for name in (OF_PEOPLE if person else OF_THINGS)):
            condition = sample(generator, None, person)
        found.append((condition, target, render(condition)))
    return found


Prompts = Literal["open", "whole", "no"]


def crossed_cases(person: bool, task: Task, count: int, seed: int = 0, prompt: Prompts = "open") -> list[Case]:
    """The same whole pictures as conditions whatever the task, and prompts of pictures that share nothing with them.

    Args:
        person: portraits, in place of things.
        prompt: open: it leaves out what the task takes from the condition, and is empty where that is everything;
            whole: it says that too; no: it is empty, so that the instruction alone decides.
    """
    empty = prompt == "no" or (prompt == "open" and task is Task.EVERYTHING)
    left = PARTS if empty else () if prompt == "whole" else LEFT_TO_CONDITION[task]
    watched = (OF_PEOPLE if person else OF_THINGS) if prompt == "no" else ()
    cases = []
    for number, (condition, target, picture) in enumerate(_crossings(person, count, seed)):
        words = caption(target, np.random.default_rng([seed, number]), left) if left != PARTS else ""
        subject = condition.subject if task is Task.OBJECT else ""
        said = said_by_prompt(target, left)
        noise = seed * 1_000_003 + number
        cases.append(Case(task, picture, words, condition, target, said, subject, noise, watched=watched))
    return cases


class Trial(NamedTuple):
    """A task and the cases of it: ``cases(count, seed)``."""

    task: Task
    cases: Callable[[int, int], list[Case]]


CROSSED_TASKS = {
    "things": (Task.EVERYTHING, Task.STYLE, Task.COMPOSITION, Task.OBJECT),
    "people": (Task.EVERYTHING, Task.STYLE, Task.FACE),
}
PROMPTS: tuple[Prompts, ...] = ("open", "whole", "no")
TASK_TRIALS = {task.value: Trial(task, partial(task_cases, task)) for task in TASKS}
VARIED_TRIALS = {
    "everything without a prompt": Trial(Task.EVERYTHING, partial(task_cases, Task.EVERYTHING, prompted=False)),
    "object without its name": Trial(Task.OBJECT, partial(task_cases, Task.OBJECT, named=False)),
}
KNOWN_TRIALS = {f"{task.value}, known": Trial(task, partial(task_cases, task, held_out=False)) for task in TASKS}


def crossed_trial(who: str, prompt: Prompts, task: Task) -> str:
    """The name of a trial of crossed conditions."""
    return f"{who}, {prompt} prompt, {task.value}"


def crossed_trials(prompts: Sequence[Prompts] = PROMPTS) -> dict[str, Trial]:
    """By name; of some kinds of prompts."""
    return {
        crossed_trial(who, prompt, task): Trial(task, partial(crossed_cases, who == "people", task, prompt=prompt))
        for who, tasks in CROSSED_TASKS.items()
        for prompt in prompts
        for task in tasks
    }


TRIALS = TASK_TRIALS | VARIED_TRIALS | KNOWN_TRIALS | crossed_trials()


def score(cases: Sequence[Case], pictures: Tensor, oracle: Oracle) -> dict[str, Rate]:
    """`rates` of pictures [B, 3, H, W] in 0-1, one a case, as the oracle sees them."""
    found = {name: numbers.cpu() for name, numbers in judge(oracle, pictures).items()}
    return rates(cases, found, pictures.cpu())


def rates(cases: Sequence[Case], found: dict[str, Tensor], pictures: Tensor) -> dict[str, Rate]:
    """How often pictures show what their conditions show and what their prompts say.

    Args:
        found: for each factor, the [B] class numbers of the pictures, as `judge` gives them.
        pictures: [B, 3, H, W] in 0-1.

    Returns:
        ``condition FACTOR``, over the cases that want the factor from the condition, or watch it, or whose prompts
        say another value; ``prompt FACTOR``, over those whose prompts say it; ``together``, all of `REPLICATED` as in
        the condition; ``background``, the plain square of cut-out conditions. What no case can show is left out.
    """
    shown = labels([case.condition for case in cases])
    asked = labels([case.target for case in cases])
    cut_out = torch.tensor([case.cut_out for case in cases])
    shown["scene"][cut_out] = UNKNOWN
    colourless = torch.tensor([{case.condition.style, case.target.style} & {*COLOURLESS} != set() for case in cases])
    shown["colour"][colourless] = asked["colour"][colourless] = UNKNOWN
    result: dict[str, Rate] = {}

    def count(name: str, hits: Tensor, counted: Tensor) -> None:
        if counted.any():
            result[name] = Rate(int((hits & counted).sum()), int(counted.sum()))

    for name in CLASSES:
        wanted, said = (torch.tensor([name in names for names in of]) for of in _names(cases))
        differs = said & (asked[name] != shown[name])
        count(f"condition {name}", found[name] == shown[name], (wanted | differs) & (shown[name] != UNKNOWN))
        count(f"prompt {name}", found[name] == asked[name], said & (asked[name] != UNKNOWN))
    together = torch.stack([found[name] == shown[name] for name in REPLICATED]).all(dim=0)
    count("together", together, ~cut_out)
    count("background", _shows_square(cases, pictures), cut_out)
    return result


def _names(cases: Sequence[Case]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    return [(*case.wanted, *case.watched) for case in cases], [case.said for case in cases]


def _shows_square(cases: Sequence[Case], pictures: Tensor) -> Tensor:
    """[B] bool: whether a third of the picture is of about the colour of its condition's corner."""
    corners = torch.tensor(np.stack([case.picture[0, 0] for case in cases])).float() / 255
    near = ((pictures - corners[..., None, None]).abs() < BACKGROUND_RANGE).all(dim=1)
    return near.float().mean(dim=(1, 2)) > BACKGROUND_SHARE
