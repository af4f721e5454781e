"""The real host in the test's own process, before any test module imports `comfy`, and tiny models on it."""

from collections.abc import Iterator
from pathlib import Path

import inside
import pytest
import torch
from tools.tiny_models import MIN_ADAPTER, MIN_CHECKPOINT, TINY_NAMES

inside.start()

from bench import Bench  # noqa: E402


@pytest.fixture(scope="module")
def bench(tiny_models: Path) -> Bench:
    """The smallest base model, with three cross-attentions."""
    return Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)


@pytest.fixture(scope="module")
def full_bench(tiny_models: Path) -> Bench:
    """SD1.5's very blocks, with sixteen."""
    checkpoint = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
    return Bench(tiny_models, checkpoint, TINY_NAMES["ip-adapter-instruct-sd15.bin"])


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes() -> Iterator[None]:
    with torch.inference_mode():
        yield
