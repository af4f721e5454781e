"""Instructions in far more words than the bank's, for the small CLIP to have read: made of lexicon.toml, which was
written without a look at the bank's unseen wordings.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import tomllib
from ipadapter_instruct_core.tasks import Task
from training.instructions import KEYWORDS
from training.instructions.choose import wordings

LEXICON = Path(__file__).with_name("lexicon.toml")
ALONE_SHARE = 0.3  # whole wordings of the lexicon; the others are a frame whose slots are filled
SLOTS = re.compile(r"\b(TAKE|WHAT|FROM|OWN)\b")


@cache
def lexicon() -> dict[str, dict[str, list[str]]]:
    """Section -> list -> entries: `shared` has frames and what fills them, each task what it takes."""
    sections = tomllib.loads(LEXICON.read_text(encoding="utf-8"))
    return {
        section: {
            name: [" ".join(entry.split()) for entry in text.split(";") if entry.strip()]
            for name, text in lists.items()
        }
        for section, lists in sections.items()
    }


def paraphrase(task: Task, generator: np.random.Generator) -> str:
    """One of some billions of wordings of a task, but none of the bank's unseen ones."""

    def one_of(words: list[str]) -> str:
        return words[int(generator.integers(len(words)))]

    shared, own = lexicon()["shared"], lexicon()[task.value]
    if generator.random() < ALONE_SHARE:
        made = one_of(own["alone"])
    else:
        made = SLOTS.sub(lambda slot: one_of({**shared, **own}[slot[0].lower()]), one_of(shared["frames"]))
    return paraphrase(task, generator) if made.lower() in _unseen() else made


@cache
def _unseen() -> frozenset[str]:
    return frozenset(wording.lower() for task in KEYWORDS for wording in wordings("unseen", task))


def all_phrases() -> list[str]:
    """Every entry, for their words."""
    return [SLOTS.sub("", entry) for lists in lexicon().values() for entries in lists.values() for entry in entries]
