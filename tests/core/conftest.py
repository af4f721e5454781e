"""Fixtures for the core's tests, which need no host and take no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig

sys.path.append(str(Path(__file__).parent))  # small_adapters.py

from small_adapters import JOINT, PAPER, PLUS, RELEASED, STREAM, random_adapter  # noqa: E402


@pytest.fixture(params=[RELEASED, PAPER, PLUS, JOINT, STREAM], ids=["released", "paper", "plus", "sd3", "sd35"])
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
