"""The training benchmark at small dimensions: its figures follow from one another, and from what is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FEATURES, ENCODERS = "from features", "with every encoder"
ENCODER_PARTS = {"autoencoder", "image encoder", "text encoder", "instruction encoder"}
STEP_PARTS = {"wait for samples", "adapter", "network", "gradients", "optimizer", "rest"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """{name: value} of the command's results."""
    path = tmp_path_factory.mktemp("benchmark") / "results.json"
    command = [sys.executable, "-m", "benchmarks.training", "--small", "--steps", "3", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    assert all(result["ok"] is None for result in results)  # targets are for real dimensions
    return {result["name"].removeprefix("training, small: "): result["value"] for result in results}


def shares(measured: dict[str, float], way: str) -> dict[str, float]:
    """{part: share} of a step."""
    start, end = f"{way}: ", ", share of the step"
    return {
        name.removeprefix(start).removesuffix(end): value
        for name, value in measured.items()
        if name.startswith(start) and name.endswith(end)
    }


def test_a_step_from_features_leaves_the_encoders_out(measured: dict[str, float]) -> None:
    assert 0 < measured[f"{FEATURES} ÷ {ENCODERS}, processor time"] < 0.8
    assert 0 < measured[f"{FEATURES} ÷ {ENCODERS}"] < 1
    assert measured[f"{FEATURES} ÷ bare UNet, processor time"] > 1  # the floor lies below


def test_the_parts_make_up_the_step(measured: dict[str, float]) -> None:
    features, encoders = shares(measured, FEATURES), shares(measured, ENCODERS)
    assert set(features) == STEP_PARTS
    assert set(encoders) == STEP_PARTS | ENCODER_PARTS
    for parts in (features, encoders):
        assert sum(parts.values()) == pytest.approx(1)
        assert all(share > 0 for share in parts.values())
        assert parts["rest"] < 0.3  # what no part explains
    assert sum(encoders[part] for part in ENCODER_PARTS) > 0.3


def test_the_loader_the_chip_and_memory_are_looked_at(measured: dict[str, float]) -> None:
    assert 0 <= measured[f"{FEATURES}: waiting for the loader, share of the steps"] < 1
    assert measured[f"{FEATURES}: images a second"] > 0
    share = measured[f"{FEATURES}: share of the chip's matrix rate"]
    assert 0 < share < 1
    assert measured[f"{FEATURES}: a step ÷ its arithmetic at that rate"] == pytest.approx(1 / share)
    # The image tower and the encoders' activations are in one process alone; Python and torch in both.
    assert 0.2 < measured[f"{FEATURES}: peak memory"] < measured[f"{ENCODERS}: peak memory"] < 8


def test_arithmetic_is_counted_as_by_hand() -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.training_parts import operations

    states, weight = torch.ones(5, 7, requires_grad=True), torch.ones(7, 3)
    assert operations(lambda: (states @ weight).sum().backward(), "cpu") == 2 * (2 * 5 * 7 * 3)  # none for the weight
    q, k = torch.ones(1, 2, 11, 8), torch.ones(1, 2, 13, 8)
    assert operations(lambda: scaled_dot_product_attention(q, k, k), "cpu") == 2 * (2 * 2 * 11 * 13 * 8)
