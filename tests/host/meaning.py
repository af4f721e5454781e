"""What the tests of meaning share: their pictures, and how these are held to what they should show."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import numpy as np
from ipadapter_instruct_core.tasks import Task
from training.miniature.judged.cases import Case, Rate, task_cases
from training.miniature.world.captions import caption

CASES, SEED = int(os.environ.get("MEANING_CASES", "4")), 2
STEPS = 8  # of the sampler: with fewer, prompts are not followed either
COLOURED = ("poster", "watercolour", "glass", "dots")  # styles that fill a thing with its own colour


def check(found: dict[str, Rate], floors: dict[str, float], ceilings: dict[str, float] = {}) -> None:
    """Fails with the figures that miss their bounds."""
    print(", ".join(f"{name} {found[name].hits} of {found[name].total}" for name in (*floors, *ceilings)))
    missed = [f"{name} {found[name]} < {bound}" for name, bound in floors.items() if found[name].share < bound]
    missed += [f"{name} {found[name]} > {bound}" for name, bound in ceilings.items() if found[name].share > bound]
    assert not missed, "; ".join(missed)


def cases_of(task: Task) -> list[Case]:
    """Pictures of everything get no prompt: what it says would be in them without an adapter too. Objects are of one
    kind, which the instruction names, so that they are sampled together."""
    if task is not Task.OBJECT:
        return task_cases(task, CASES, SEED, prompted=task is not Task.EVERYTHING, held_out=False)
    cases = [case for case in task_cases(task, 32 * CASES, SEED, held_out=False) if case.target.style in COLOURED]
    (subject, _), *_ = Counter(case.subject for case in cases).most_common()
    return [case for case in cases if case.subject == subject][:CASES]


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
