"""Small adapters for the core's tests: every part of a real one, in a few thousand weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, Base

sys.path.append(str(Path(__file__).parents[1] / "assets"))  # reference_vectors.py

# Sizes that are unlike one another, so that a mix-up of two of them cannot go unseen.
RELEASED = AdapterConfig(
    image_width=40,
    width=48,
    heads=2,
    depth=3,
    token_count=5,
    output_width=56,
    image_ff_mult=4,
    instruction_width=24,
    prompt_width=32,
    instruction_ff_mult=2,
    layers=((1, 64), (3, 128), (5, 192)),
    base=Base.OTHER,
)
PAPER = replace(RELEASED, prompt_width=None)
PLUS = replace(RELEASED, prompt_width=None, instruction_width=None)


def random_adapter(config: AdapterConfig, seed: int = 0) -> Adapter:
    """An adapter in which no weight is a constant, norms' included."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapter.requires_grad_(False)


@pytest.fixture(params=[RELEASED, PAPER, PLUS], ids=["released", "paper", "plus"])
def any_config(request: pytest.FixtureRequest) -> AdapterConfig:
    return request.param


@pytest.fixture
def any_adapter(any_config: AdapterConfig) -> Adapter:
    return random_adapter(any_config)


@pytest.fixture
def released() -> Adapter:
    return random_adapter(RELEASED)


@pytest.fixture
def plus() -> Adapter:
    return random_adapter(PLUS)


@pytest.fixture
def sources() -> dict[str, torch.Tensor]:
    """A batch of three pictures, instructions and prompts."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"image": (3, 17, 40), "instruction": (3, 7, 24), "prompt": (3, 9, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
