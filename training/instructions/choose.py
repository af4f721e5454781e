"""Which words a sample's instruction has: the task's fixed wording, one of the bank, or one that training never saw."""

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from ipadapter_instruct_core.tasks import PHRASES, Task, phrase
from training.instructions import UNSEEN, load_bank, with_subject

Wording = Literal["fixed", "bank", "unseen"]


def table(task: Task, bank: Mapping[Task, Sequence[str]]) -> list[str]:
    """All that training may tell: first the fixed wording (paper, Sec. 4.3), then the bank's.

    The bank has none for the tasks that the paper does not train; these have the core's phrases.
    """
    return [phrase(task), *bank.get(task, PHRASES[task])]


def about(words: str, task: Task, subject: str) -> str:
    """The words as a sample is told them: the object task names its subject, where that is known (Sec. 3.4)."""
    return with_subject(words, subject) if task is Task.OBJECT else words


@cache
def wordings(kind: Wording, task: Task) -> Sequence[str]:
    """What `drawn` draws from."""
    first, *bank = table(task, load_bank(UNSEEN if kind == "unseen" else None))
    return [first] if kind == "fixed" else bank


def drawn(kind: Wording, task: Task, subject: str, seed: int) -> str:
    """One instruction of a held-out sample, always the same for a seed."""
    return about(random.Random(seed).choice(wordings(kind, task)), task, subject)
