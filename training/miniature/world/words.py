"""Captions -> tokens as CLIP-L's tokenizer and the hosts write them, and the few words that the world knows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from training.miniature.world import captions
from training.miniature.world.factors import COLOURS, IDENTITIES, SUBJECTS

LENGTH, START, END = 77, 49406, 49407


@cache
def _tokenizer() -> Any:
    from open_clip import SimpleTokenizer  # slow to import

    return SimpleTokenizer(context_length=LENGTH)


@cache
def encode(text: str) -> tuple[int, ...]:
    """The tokens of a text, without start and end."""
    return tuple(_tokenizer().encode(text))


def tokenize(texts: Sequence[str]) -> Tensor:
    """[B, 77] int64: start, words, and the end token up to the last place (ComfyUI and SD1.5 pad with it)."""
    rows = torch.full((len(texts), LENGTH), END)
    rows[:, 0] = START
    for row, text in zip(rows, texts, strict=True):
        words = encode(text)[: LENGTH - 2]
        row[1 : 1 + len(words)] = torch.tensor(words, dtype=torch.int64)
    return rows


@cache
def vocabulary() -> tuple[int, ...]:
    """The tokens that captions are made of, in rising order."""
    tables = (captions.STYLE_WORDS, captions.SCENE_WORDS, captions.LAYOUT_WORDS, captions.EXPRESSION_WORDS)
    texts = [text for table in tables for phrases in table.values() for text in phrases]
    texts += [*SUBJECTS, *(captions.many(subject) for subject in SUBJECTS), *COLOURS, *captions.FIXED_WORDS]
    texts += [captions.looks(identity) for identity in IDENTITIES]
    return tuple(sorted({START, END, *itertools.chain.from_iterable(encode(text) for text in texts)}))
