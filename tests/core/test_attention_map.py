"""The attention that is shown is that which the projector computes."""

from __future__ import annotations

import math

import pytest
import torch
from ipadapter_instruct_core.attention_map import attention_shares
from ipadapter_instruct_core.config import AdapterConfig
from ipadapter_instruct_core.projector import Projector

CONFIG = AdapterConfig(
    image_width=24, width=64, heads=1, depth=2, token_count=3, output_width=32, instruction_width=16, prompt_width=None
)


@pytest.fixture
def projector() -> Projector:
    torch.manual_seed(0)
    return Projector(CONFIG).eval()


def test_shares_are_those_of_a_softmax_by_hand(projector: Projector) -> None:
    image, instruction = torch.randn(2, 10, 24), torch.randn(2, 4, 16)  # a class token and 3 x 3 patches
    with torch.no_grad():
        found = attention_shares(projector, image, instruction)
        latents, source, words = projector.latents.expand(2, -1, -1), projector.proj_in(image), None
        words = projector.proj_new_input(instruction)
        sums = torch.zeros(2, 10)
        for (attend, feed), (listen, feed_too) in zip(projector.layers, projector.new_input_layers, strict=True):
            normed = attend.norm2(latents)
            keys = torch.cat([attend.norm1(source), normed], dim=1) @ attend.to_kv.weight[:64].T
            weights = (normed @ attend.to_q.weight.T @ keys.transpose(1, 2) / math.sqrt(64)).softmax(dim=-1)
            sums += weights[..., :10].mean(dim=1)
            latents = latents + attend(source, latents)
            latents = latents + feed(latents)
            latents = latents + listen(words, latents)
            latents = latents + feed_too(latents)
    expected = sums[:, 1:] / sums[:, 1:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected.view(2, 3, 3))


def test_it_finds_the_patch_that_is_attended_to_and_leaves_the_projector_alone(projector: Projector) -> None:
    image, instruction = torch.randn(1, 16, 24), torch.randn(1, 4, 16)  # 4 x 4 patches, no class token
    with torch.no_grad():
        before = projector(image, instruction)
        maps = attention_shares(projector, image, instruction)
        assert maps.shape == (1, 4, 4)
        torch.testing.assert_close(maps.sum(), torch.tensor(1.0))
        torch.testing.assert_close(projector(image, instruction), before, rtol=0, atol=0)
        for layer in projector.layers:  # a key that all queries like: the image's first feature
            layer[0].to_q.weight.zero_()
        torch.testing.assert_close(attention_shares(projector, image, instruction), torch.full((1, 4, 4), 1 / 16))
