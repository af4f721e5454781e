"""The models that come with the miniature: they see and paint what they were taught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.encoders import load_open_clip
from torch.nn.functional import normalize
from training.miniature.expand.write import write_clip
from training.miniature.models import autoencoder, base, clip, oracle
from training.miniature.world.captions import caption
from training.miniature.world.drawn import to_tensor
from training.miniature.world.factors import STYLES, Factors, sample
from training.miniature.world.style import render


@pytest.fixture(scope="module")
def held_out() -> tuple[list[Factors], torch.Tensor]:
    """300 pictures of combinations that the adapters' training never saw."""
    generator = np.random.default_rng(100)
    factors = [sample(generator, True, person=n % 3 == 0) for n in range(300)]
    return factors, to_tensor(np.stack([render(one) for one in factors]))


def test_the_oracle_knows_every_factor_of_held_out_combinations(held_out: tuple) -> None:
    factors, images = held_out
    scores = oracle.accuracy(oracle.judge(oracle.load(), images), oracle.labels(factors))
    assert scores.keys() == oracle.CLASSES.keys()
    assert min(scores.values()) >= 0.98, scores


def test_the_oracle_still_knows_them_after_the_autoencoder(held_out: tuple) -> None:
    factors, images = held_out
    coder = autoencoder.load()
    with torch.inference_mode():
        passed = coder.decode(coder.encode(images)).clamp(0, 1)
    scores = oracle.accuracy(oracle.judge(oracle.load(), passed), oracle.labels(factors))
    assert min(scores.values()) >= 0.9, scores


def test_the_autoencoder_brings_pictures_back(held_out: tuple) -> None:
    _, images = held_out
    coder = autoencoder.load()
    with torch.inference_mode():
        latents = coder.encode(images)
        errors = (coder.decode(latents).clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
    assert 0.8 < latents.std() < 1.25
    assert -10 * errors.log10().mean() > 23


@pytest.mark.parametrize("style", STYLES)
def test_faces_stay_legible_in_every_style(style: str) -> None:
    """The autoencoder of before these drawings lost 44 of 100 of their expressions in neon, 8 in blueprint."""
    generator = np.random.default_rng(5)
    factors = [sample(generator, None, style=style, person=True) for _ in range(60)]
    coder = autoencoder.load()
    with torch.inference_mode():
        passed = coder.decode(coder.encode(to_tensor(np.stack([render(one) for one in factors])))).clamp(0, 1)
    scores = oracle.accuracy(oracle.judge(oracle.load(), passed), oracle.labels(factors))
    assert min(scores["expression"], scores["identity"]) >= 0.95, scores


def test_a_mistake_in_a_face_counts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    coder, pictures = autoencoder.load(), torch.full((2, 3, 64, 64), 0.5)
    wrong = pictures.clone()
    wrong[0, :, 28:36, 28:36] = 1.0
    monkeypatch.setattr(coder, "decode", lambda latents: wrong)
    (thing, error), (person, same) = (autoencoder.autoencoder_loss(coder, pictures, portraits) for portraits in (0, 1))
    assert error == same and person - thing > 0.01


def test_the_clip_finds_a_pictures_own_caption(held_out: tuple, tmp_path: Path) -> None:
    """Also as written for others: the core's loader reads what `expand` writes."""
    model = load_open_clip(str(write_clip(tmp_path)))
    factors, images = held_out
    generator = np.random.default_rng(101)
    texts = [caption(one, generator) for one in factors[:100]]
    with torch.inference_mode():
        seen = normalize(model.clip.encode_image(model.preprocess(images[:100])), dim=-1)
        said = normalize(model.clip.encode_text(model.tokenizer(texts)), dim=-1)
    first = (seen @ said.T).argmax(dim=1) == torch.arange(100)
    assert first.float().mean() > 0.9  # one in a hundred by chance
    assert model.image_tokens(model.preprocess(images[:2])).shape == (2, 65, clip.CONFIG["vision_cfg"]["width"])
    assert model.instruction_tokens(["use the style"]).shape == (1, 77, clip.CONFIG["text_cfg"]["width"])


def test_the_base_paints_what_its_caption_says() -> None:
    generator = np.random.default_rng(102)
    factors = [sample(generator, True, person=n % 4 == 0) for n in range(32)]
    texts = [caption(one, generator) for one in factors]
    images = autoencoder.load().decode(base.paint(base.load(), texts, seed=0, steps=12)).clamp(0, 1)
    scores = oracle.accuracy(oracle.judge(oracle.load(), images), oracle.labels(factors))
    assert min(scores[name] for name in ("subject", "style", "layout", "scene")) > 0.95, scores  # by chance 0.17
