"""A small CLIP: open_clip's own model, taught which caption belongs to which picture.

Beside the contrast of pictures and captions, two helpers that are thrown away keep its hidden states rich: what the
image tower knows before its last layer must tell every factor, and what the text tower makes of an instruction must
tell the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ipadapter_instruct_core.encoders import OpenClip
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from training.instructions import load_bank
from training.miniature.models.fit import Fit, best_device, fit
from training.miniature.models.oracle import CLASSES, UNKNOWN, labels
from training.miniature.models.weights import made_by, read, save
from training.miniature.world.captions import caption, random_omissions
from training.miniature.world.drawn import Pictures, pictures, to_tensor
from training.miniature.world.factors import Factors, sample
from training.miniature.world.style import render, render_cut_out
from training.miniature.world.words import END, START, encode, vocabulary

CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 6, "layers": 3},
}
TOKENS = "token_embedding.weight"


def all_words() -> Tensor:
    """[49408, 192]: what words mean before any training; the same on every machine."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((49408, 192), dtype=np.float32) * 0.02)


def known_words() -> list[int]:
    """The tokens that the text tower meets in training: those of captions and instructions."""
    phrases = [phrase for bank in load_bank().values() for phrase in bank]
    return sorted({*vocabulary(), *(token for phrase in phrases for token in encode(phrase))})


def load() -> OpenClip:
    """The trained CLIP that comes with the project."""
    model = OpenClip(CONFIG)
    model.clip.load_state_dict(whole_state(read("clip")))
    return model.requires_grad_(False).eval()


def whole_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kept weights with the words that training never met."""
    words = all_words()
    words[state["known_words"]] = state[TOKENS]
    return {**{key: tensor for key, tensor in state.items() if key != "known_words"}, TOKENS: words}


@dataclass
class ClipConfig:
    """Attributes:
    extras: pictures of a batch that only conditions look like: cut-out subjects, and faces from close by.
    init: go on from the weights that come with the project, and teach what sees alone.
    """

    steps: int = 6000
    batch: int = 512
    extras: int = 96
    instructions: int = 64
    rate: float = 1e-3
    pictures: int = 200_000
    seed: int = 0
    init: bool = False
    device: str = field(default_factory=best_device)
    workers: int = 8
    folder: Path = Path("runs/miniature")


def read_text(clip: Any, words: Tensor) -> Tensor:
    """Rows [B, L] of the embedding -> last hidden states after the norm, as open_clip makes them of all 77 places: what
    looks back may be shown the first L."""
    length = words.shape[1]
    hidden = clip.token_embedding(words) + clip.positional_embedding[:length]
    return clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))


class Lessons(nn.Module):
    """The CLIP and its two helpers."""

    clip: Any  # open_clip's
    known_words: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.clip = OpenClip(CONFIG).clip
        self.register_buffer("known_words", torch.tensor(known_words()), persistent=False)
        self.clip.token_embedding = nn.Embedding.from_pretrained(all_words()[self.known_words], freeze=False)
        width = CONFIG["vision_cfg"]["width"]
        self.factors = nn.ModuleDict({name: nn.Linear(2 * width, len(classes)) for name, classes in CLASSES.items()})
        self.task = nn.Linear(CONFIG["text_cfg"]["width"], tasks)

    def go_on(self, state: dict[str, Tensor]) -> None:
        """Begin with kept weights, of which those that read text stay as they are."""
        self.known_words = state.pop("known_words")
        self.clip.token_embedding = nn.Embedding.from_pretrained(state[TOKENS])
        self.clip.load_state_dict(state)
        self.clip.requires_grad_(False)
        self.clip.visual.requires_grad_(True)

    def read(self, texts: Tensor) -> Tensor:
        """Tokens [B, L] -> what `read_text` gives."""
        # Padding reads as any word: no word looks forward.
        return read_text(self.clip, torch.searchsorted(self.known_words, texts))

    def forward(self, images: Tensor, texts: Tensor, instructions: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Similarities [B, B], logits of each factor, logits of each instruction's task."""
        out = self.clip.visual.forward_intermediates(images, indices=[-2], output_fmt="NLC", output_extra_tokens=True)
        tokens = torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)
        seen = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
        hidden = self.read(texts)
        said = hidden[torch.arange(len(texts)), texts.argmax(dim=1)] @ self.clip.text_projection
        similar = self.clip.logit_scale.exp() * normalize(out["image_features"], dim=-1) @ normalize(said, dim=-1).T
        return (
            similar,
            {name: head(seen) for name, head in self.factors.items()},
            self.task(self.read(instructions).mean(dim=1)),
        )


def extra(generator: np.random.Generator) -> tuple[np.ndarray, Factors, str]:
    """A picture as conditions have them, what it shows, and its caption."""
    if generator.random() < 0.4:
        person = replace(sample(generator, None, person=True), zoom=1.25)
        return render(person), person, "close up, " + caption(person, generator)
    thing = sample(generator, None)
    red, green, blue = (int(value) for value in generator.integers(0, 256, 3))
    words = caption(thing, generator, ("layout", "scene"))
    return render_cut_out(thing, (red, green, blue)), thing, words + " on a plain square"


def run(config: ClipConfig) -> None:
    torch.manual_seed(config.seed)
    data = pictures(config.pictures, config.seed, config.folder / "pictures", held_out=None)
    model, preprocess = Lessons(len(load_bank())), OpenClip(CONFIG).preprocess
    if config.init:
        model.go_on(read("clip"))
    model.to(config.device)

    def loss_of(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, wanted = preprocess(to_tensor(batch["pixels"])), batch["labels"]
        similar, seen, task = model(images, batch["texts"], batch["instructions"])
        own = torch.arange(len(images), device=images.device)
        contrast = (cross_entropy(similar, own) + cross_entropy(similar.T, own)) / 2
        named = zip(CLASSES, wanted.unbind(dim=1), strict=True)
        attributes = sum(cross_entropy(seen[name], numbers, ignore_index=UNKNOWN) for name, numbers in named)
        told = cross_entropy(task, batch["tasks"])
        figures = {"contrast": contrast, "attributes": attributes, "task": told}
        return contrast + 0.3 * attributes + 0.3 * told, figures

    draw = partial(draw_batch, config, data)
    model = fit(
        model, draw, loss_of, Fit(config.steps, config.rate), config.folder / "clip", config.device, config.workers
    )
    state = {**model.clip.state_dict(), "known_words": model.known_words}
    print(save(state, "clip", made_by(config, data.sha256)))


def draw_batch(config: ClipConfig, data: Pictures, step: int) -> dict[str, Tensor]:
    """Pictures ([B, 64, 64, 3] uint8), their captions' tokens and factors; instructions' tokens and tasks."""
    generator = np.random.default_rng([config.seed, step])
    chosen = generator.integers(len(data.factors), size=config.batch - config.extras)
    factors = [data.factors[i] for i in chosen]
    texts = [caption(one, generator, random_omissions(generator)) for one in factors]
    extras = [extra(generator) for _ in range(config.extras)]
    pixels = np.concatenate([data.pixels[chosen], np.stack([picture for picture, _, _ in extras])])
    texts += [text for _, _, text in extras]
    wanted = labels(factors + [one for _, one, _ in extras])
    cut_out = torch.tensor([False] * len(chosen) + [text.endswith("on a plain square") for _, _, text in extras])
    for name in ("layout", "scene"):
        wanted[name][cut_out] = UNKNOWN
    bank = [(phrase, number) for number, phrases in enumerate(load_bank().values()) for phrase in phrases]
    told = [bank[i] for i in generator.integers(len(bank), size=config.instructions)]
    return {
        "pixels": torch.from_numpy(pixels),
        "labels": torch.stack([wanted[name] for name in CLASSES], dim=1),
        "texts": tokens(texts),
        "instructions": tokens([phrase for phrase, _ in told]),
        "tasks": torch.tensor([number for _, number in told]),
    }


def tokens(texts: list[str], length: int = 0) -> Tensor:
    """[B, L]: open_clip's own tokens, cut to the longest text, which changes nothing for a tower that looks back, or to
    ``length`` where that is longer."""
    rows = [(START, *encode(text)[:75], END) for text in texts]
    longest = max(length, *map(len, rows))
    return torch.tensor([row + (0,) * (longest - len(row)) for row in rows])
