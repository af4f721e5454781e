"""What the small CLIP has read of instructions: many words, and none of the wordings that nobody trains on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.tasks import Task, phrase
from training.instructions.choose import wordings
from training.miniature.judged.wordings import cosines, nearest
from training.miniature.models import clip, text_tower, weights
from training.miniature.models.text_tower import TASKS, TextTowerConfig, draw_batch
from training.miniature.world.paraphrases import SLOTS, lexicon, paraphrase
from training.miniature.world.words import END, START, encode

UNSEEN = {task: list(wordings("unseen", task)) for task in TASKS}


def runs_of_four(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[place : place + 4]) for place in range(len(words) - 3)}


def test_no_four_words_on_end_are_of_an_unseen_wording() -> None:
    unseen = set().union(*(runs_of_four(wording) for wordings in UNSEEN.values() for wording in wordings))
    assert len(unseen) > 500
    for section, lists in lexicon().items():
        for name, entries in lists.items():
            parts = [part for entry in entries for part in SLOTS.split(entry)]
            assert not [part for part in parts if runs_of_four(part) & unseen], f"{section}.{name}"


@pytest.mark.parametrize("task", TASKS)
def test_paraphrases_are_many_and_whole(task: Task) -> None:
    made = [paraphrase(task, np.random.default_rng(seed)) for seed in range(1000)]
    assert made[:20] == [paraphrase(task, np.random.default_rng(seed)) for seed in range(20)]
    assert len(set(made)) > 800
    assert not [wording for wording in made if SLOTS.search(wording) or ";" in wording or not wording.strip()]
    assert not {wording.lower() for wording in made} & {wording.lower() for wording in UNSEEN[task]}


def test_lessons_hold_the_tasks_words_and_never_an_unseen_wording() -> None:
    unseen = {tuple(encode(wording)) for wordings in UNSEEN.values() for wording in wordings}
    fixed = {tuple(encode(phrase(task))): place for place, task in enumerate(TASKS)}
    met = 0
    for step in range(30):
        batch = draw_batch(TextTowerConfig(instructions=64, captions=2), step)
        assert batch["instructions"].shape[1] in text_tower.LENGTHS
        for row, task in zip(batch["instructions"].tolist(), batch["tasks"].tolist(), strict=True):
            words = tuple(word for word in row if word not in (START, END, text_tower.PADDING))
            assert words not in unseen
            met += fixed.get(words, -1) == task
            assert fixed.get(words, task) == task
    assert met > 50  # a tenth of 1920, of which some have a stranger among their words


def test_a_lesson_is_learned_and_captions_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower is left as it was, and where captions lie; the words that were read are kept."""
    before = weights.read("clip")
    path_of = weights.path_of
    saved: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(text_tower, "save", lambda state, *_: saved.update(state) or path_of("clip"))
    config = TextTowerConfig(steps=20, rate=2e-3, captions=8, instructions=16, folder=tmp_path, device="cpu")
    text_tower.run(config)
    lines = (tmp_path / "text-tower" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["captions_moved"] < 1e-4  # 1e-3 where they are pushed away
    visual = [key for key in before if key.startswith("visual.")]
    assert len(visual) > 50 and all(torch.equal(saved[key], before[key]) for key in visual)
    moved = [key for key in before if key.startswith("transformer.") and not torch.equal(saved[key], before[key])]
    assert len(moved) > 20
    assert saved[clip.TOKENS].shape[0] == len(saved["known_words"]) > len(clip.known_words())


def test_the_shipped_tower_tells_tasks_apart_by_words_that_it_was_never_told() -> None:
    """Of the fixed ones, and of the 50 unseen ones a task how many lie nearest the mean of its bank."""
    model = clip.load()
    assert max(fixed for fixed, _ in cosines(model, 10).values()) <= 0.8
    near = nearest(model, 100)
    assert min(near.values()) >= 0.75, near
