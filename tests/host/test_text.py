"""What adapters read of a text: as many tokens as they were trained with, whatever CLIP is connected."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.sd
import inside
import pytest
import torch
from bench import Bench, assert_same

text = importlib.import_module(f"{inside.PACK}.nodes.host.text")
POSITIONS = "text_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def long_clip(bench: Bench) -> Any:
    """The bench's CLIP-L with more positions, whose first are the same."""
    state = {
        key.split("transformer.", 1)[1]: each for key, each in bench.clip.get_sd().items() if "transformer." in key
    }
    state[POSITIONS] = torch.cat([state[POSITIONS]] * 4)[:248].clone()
    return comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


@pytest.mark.parametrize("words", [5, 75])
def test_a_long_clip_gives_what_clip_l_gives(bench: Bench, long_clip: Any, words: int) -> None:
    given = [text.encode_text(clip, "style " * words, bench.adapter.config, True) for clip in (bench.clip, long_clip)]
    assert given[1].shape == (1, 77, 768)
    assert_same(given[1], given[0], 1e-3)


def test_what_a_long_clip_would_have_read_is_cut_with_a_warning(
    bench: Bench, long_clip: Any, caplog: pytest.LogCaptureFixture
) -> None:
    words = "style " * 75
    cut = text.encode_text(long_clip, words + "umbrella teapot", bench.adapter.config, True)
    assert "'umbrella teapot'" in caplog.text
    assert_same(cut, text.encode_text(long_clip, words, bench.adapter.config, True))
