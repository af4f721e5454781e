"""The real host in the test's own process, before any test module imports `comfy`, and tiny models on it."""

from collections.abc import Iterator
from pathlib import Path

import inside
import pytest
import torch
from tools.tiny.models import MIN_ADAPTER, MIN_CHECKPOINT, SD35_ADAPTER, SD35_CHECKPOINT, TINY_NAMES

inside.start()

from bench import Bench, Sd3Bench  # noqa: E402


@pytest.fixture(scope="module")
def bench(tiny_models: Path) -> Bench:
    """The smallest base model, with three cross-attentions."""
    return Bench(tiny_models, MIN_CHECKPOINT, MIN_ADAPTER)


@pytest.fixture(scope="module")
def full_bench(tiny_models: Path) -> Bench:
    """SD1.5's very blocks, with sixteen."""
    checkpoint = TINY_NAMES["v1-5-pruned-emaonly-fp16.safetensors"]
    return Bench(tiny_models, checkpoint, TINY_NAMES["ip-adapter-instruct-sd15.bin"])


@pytest.fixture(scope="session")
def sd3_bench(tiny_models: Path) -> Sd3Bench:
    """SD3 of four blocks, with two joint attentions that the adapter adds to."""
    checkpoint = TINY_NAMES["sd3_medium_incl_clips_t5xxlfp8.safetensors"]
    return Sd3Bench(tiny_models, checkpoint, TINY_NAMES["ip-adapter-instruct-sd3.bin"], torch.float32)


@pytest.fixture(scope="session")
def sd35_bench(tiny_models: Path) -> Sd3Bench:
    """The same of SD3.5, each block with a second attention of the image alone."""
    made = Sd3Bench(tiny_models, SD35_CHECKPOINT, SD35_ADAPTER, torch.float32)
    made.normed = True
    return made


@pytest.fixture(params=["sd3", "sd35"])
def flow_bench(request: pytest.FixtureRequest) -> Sd3Bench:
    return request.getfixturevalue(f"{request.param}_bench")


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes() -> Iterator[None]:
    with torch.inference_mode():
        yield
