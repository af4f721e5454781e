"""What the projector and the adapter promise beyond the reference vectors."""

from __future__ import annotations

import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import Form, InstructionEncoder
from ipadapter_instruct_core.projector import NEW_LAYER_SIGMA
from torch import Tensor

PROMPT_WIDTHS = pytest.mark.parametrize("prompt_width", [None, 32], ids=["paper", "released"])


@PROMPT_WIDTHS
def test_a_fresh_instruct_adapter_equals_its_ip_adapter_plus(
    plus: Adapter, sources: dict[str, Tensor], prompt_width: int | None
) -> None:
    fresh = plus.with_instruction(24, prompt_width)
    before = plus.image_proj(sources["image"])
    assert torch.equal(fresh.image_proj(**sources), before)
    for ours, theirs in zip(fresh.key_values(before), plus.key_values(before), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@PROMPT_WIDTHS
@pytest.mark.parametrize("part", ["attention", "feed-forward"])
def test_it_follows_instructions_once_a_final_weight_is_not_zero(
    plus: Adapter, sources: dict[str, Tensor], prompt_width: int | None, part: str
) -> None:
    fresh = plus.with_instruction(24, prompt_width)
    before = plus.image_proj(sources["image"])
    attention, feed = fresh.image_proj.new_input_layers[1]
    (attention.to_out if part == "attention" else feed[-1]).weight.data[0, 0] = 1e3
    assert not torch.equal(fresh.image_proj(**sources), before)


@PROMPT_WIDTHS
@pytest.mark.parametrize("sigma", [NEW_LAYER_SIGMA, 0.07])
def test_new_layers_start_as_white_noise_with_zeros_at_the_end(
    plus: Adapter, prompt_width: int | None, sigma: float
) -> None:
    fresh = plus.with_instruction(24, prompt_width, torch.Generator().manual_seed(0), sigma).image_proj
    stacks = [fresh.new_input_layers, *([fresh.prompt_layers] if prompt_width else [])]
    for attention, feed in (layer for stack in stacks for layer in stack):
        assert not attention.to_out.weight.any() and not feed[-1].weight.any()
        for linear in (attention.to_q, attention.to_kv, feed[1]):
            assert float(linear.weight.detach().std()) == pytest.approx(sigma, rel=0.1)
            assert float(linear.weight.detach().mean()) == pytest.approx(0.0, abs=sigma / 10)
    assert NEW_LAYER_SIGMA == 1e-4


def test_a_fresh_adapter_can_be_trained(plus: Adapter, sources: dict[str, Tensor]) -> None:
    """Zeros at the end of every new layer must not keep gradients from all of them."""
    fresh = plus.with_instruction(24, 32)
    fresh.image_proj(**sources).square().sum().backward()
    for stack in (fresh.image_proj.new_input_layers, fresh.image_proj.prompt_layers):
        assert all(attention.to_out.weight.grad.any() for attention, _ in stack)


def test_the_original_is_left_as_it_was(plus: Adapter) -> None:
    before = {key: value.clone() for key, value in plus.state_dict().items()}
    fresh = plus.with_instruction(24, 32)
    for parameter in fresh.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in plus.state_dict().items())
    assert not plus.config.follows_instructions and fresh.config.follows_instructions


@pytest.mark.parametrize("width, encoder", [(768, InstructionEncoder.CLIP_L), (1024, InstructionEncoder.OPEN_CLIP)])
def test_a_fresh_adapter_knows_its_encoder(plus: Adapter, width: int, encoder: InstructionEncoder) -> None:
    assert plus.with_instruction(width).config.instruction_encoder is encoder


def test_each_picture_of_a_batch_stands_alone(any_adapter: Adapter, sources: dict[str, Tensor]) -> None:
    together = any_adapter.image_proj(**sources)
    for i in range(3):
        alone = any_adapter.image_proj(**{name: source[i : i + 1] for name, source in sources.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["image", "instruction", "prompt"])
def test_every_source_is_read(released: Adapter, sources: dict[str, Tensor], name: str) -> None:
    before = released.image_proj(**sources)
    after = released.image_proj(**{**sources, name: sources[name].flip(0)})
    assert float((after - before).abs().max()) > 1e-3


def test_tokens_and_keys_have_the_stated_shapes(any_adapter: Adapter, sources: dict[str, Tensor]) -> None:
    tokens = any_adapter.image_proj(**sources)
    assert tokens.shape == (3, 5, 56)
    embed = torch.nn.Linear(56, 64) if any_adapter.config.form is Form.JOINT else torch.nn.Identity()
    pairs = any_adapter.key_values(tokens, embed)
    shapes = [(3, 5, width) for _, width in any_adapter.config.layers]
    assert [(key.shape, value.shape) for key, value in pairs] == list(zip(shapes, shapes, strict=True))
