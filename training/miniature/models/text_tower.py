"""Teach the small CLIP's text tower instructions in far more words than the bank's; captions stay where they are.

A wording lies where its task does by the angle of its mean state, in all 77 places, which is what an adapter reads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ipadapter_instruct_core.tasks import Task, phrase
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from training.instructions import KEYWORDS
from training.instructions.choose import wordings
from training.miniature.models.clip import CONFIG, TOKENS, known_words, load, read_text, tokens
from training.miniature.models.fit import Fit, best_device, fit
from training.miniature.models.weights import made_by, save
from training.miniature.world.captions import caption, random_omissions
from training.miniature.world.drawn import PERSON_SHARE
from training.miniature.world.factors import sample
from training.miniature.world.paraphrases import all_phrases, paraphrase
from training.miniature.world.words import END, LENGTH, START, encode

TASKS = tuple(KEYWORDS)
PADDING = 0  # open_clip's; an adapter reads the states of padding too
LENGTHS = (24, 36, LENGTH)  # places of a batch, by lot, since all of them cost three times as much as the first
ANGLE_SCALE = 12.0
FIXED_SHARE, BANK_SHARE = 0.1, 0.45  # of the instructions in a batch; the others are paraphrases
STRANGE_SHARE = 0.1  # of an instruction's words, any others in their place: it is to bear words that it never read
CAPTION_WEIGHT = 10.0


@dataclass
class TextTowerConfig:
    """Attributes:
    captions, instructions: of a batch.
    """

    steps: int = 1500
    captions: int = 32
    instructions: int = 64
    rate: float = 5e-4
    seed: int = 0
    device: str = field(default_factory=best_device)
    workers: int = 0
    folder: Path = Path("runs/miniature")


class Tower(nn.Module):
    """A CLIP of which only what reads text is trained, and where each task lies."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(True)
        self.clip.visual.requires_grad_(False)
        self.clip.logit_scale.requires_grad_(False)
        self.tasks = nn.Parameter(torch.randn(len(TASKS), CONFIG["text_cfg"]["width"]))

    def said(self, texts: Tensor) -> Tensor:
        """The embedding [B, D] of each caption."""
        last = read_text(self.clip, texts)[torch.arange(len(texts)), texts.argmax(dim=1)]
        return (last @ self.clip.text_projection).float()  # a cosine near 1 needs more than bfloat16 has

    def told(self, instructions: Tensor) -> Tensor:
        """Logits of each instruction's task."""
        means = read_text(self.clip, instructions).mean(dim=1)
        return ANGLE_SCALE * normalize(means, dim=-1) @ normalize(self.tasks, dim=-1).T


def run(config: TextTowerConfig) -> None:
    torch.manual_seed(config.seed)
    model = Tower(load().clip).to(config.device)
    before = copy.deepcopy(model).requires_grad_(False)

    def loss_of(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        moved = 1 - cosine_similarity(model.said(batch["captions"]), before.said(batch["captions"])).mean()
        told = model.told(batch["instructions"])
        missed = cross_entropy(told, batch["tasks"])
        right = (told.argmax(dim=1) == batch["tasks"]).float().mean()
        return CAPTION_WEIGHT * moved + missed, {"captions_moved": moved, "told": missed, "right": right}

    settings = Fit(config.steps, config.rate, average=0.99)
    draw = partial(draw_batch, config)
    fit(model, draw, loss_of, settings, config.folder / "text-tower", config.device, config.workers)
    read = torch.tensor(sorted({*known_words(), PADDING, *(word for text in all_phrases() for word in encode(text))}))
    state = {**model.clip.state_dict(), "known_words": read}
    state[TOKENS] = state[TOKENS][read]
    print(save(state, "clip", made_by(config, "none: captions alone")))


def draw_batch(config: TextTowerConfig, step: int) -> dict[str, Tensor]:
    """Tokens of captions and of instructions, [B, L] each, and the instructions' tasks."""
    generator = np.random.default_rng([config.seed, step])
    seen = [sample(generator, None, person=generator.random() < PERSON_SHARE) for _ in range(config.captions)]
    tasks = generator.integers(len(TASKS), size=config.instructions)
    told = tokens([instruction(TASKS[number], generator) for number in tasks], LENGTH)
    return {
        "captions": tokens([caption(one, generator, random_omissions(generator)) for one in seen]),
        "instructions": with_strangers(told, generator)[:, : LENGTHS[int(generator.integers(len(LENGTHS)))]],
        "tasks": torch.from_numpy(tasks),
    }


def instruction(task: Task, generator: np.random.Generator) -> str:
    """The fixed wording, one of the bank, or a paraphrase."""
    kind = generator.random()
    if kind < FIXED_SHARE:
        return phrase(task)
    bank = wordings("bank", task)
    return bank[int(generator.integers(len(bank)))] if kind < FIXED_SHARE + BANK_SHARE else paraphrase(task, generator)


def with_strangers(tokens: Tensor, generator: np.random.Generator) -> Tensor:
    """Some words of each row [B, 77] exchanged for any at all."""
    words = (tokens != START) & (tokens != END) & (tokens != PADDING)
    strange = torch.from_numpy(generator.random(tokens.shape) < STRANGE_SHARE) & words
    return torch.where(strange, torch.from_numpy(generator.integers(1, START, tokens.shape)), tokens)
