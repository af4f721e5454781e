"""The host's own models with our slots in them, against the reference vectors."""

from __future__ import annotations

import pytest
import torch
from reference_mmdit import hosted_adapter, mmdit, noise, sampled, sigmas
from reference_unet import unet_errors
from reference_vectors import names, read_reference_vectors, relative_error

MODEL_TOLERANCE, SAMPLING_TOLERANCE, SIGMAS_TOLERANCE = 5e-4, 1e-3, 1e-6


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    with torch.inference_mode():
        return unet_errors(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["noise_plain", "noise_adapted"])
def test_unet_sd15(errors: dict[str, float], name: str) -> None:
    assert errors[name] < MODEL_TOLERANCE


@pytest.mark.parametrize("case", names("mmdit-*", "mmdit-sd3"))
def test_mmdit(case: str) -> None:
    vectors = read_reference_vectors(case)
    model, adapter = mmdit(vectors), hosted_adapter(vectors)
    for name, found in {"plain": noise(vectors, model), "adapted": noise(vectors, model, adapter)}.items():
        assert relative_error(found, vectors.expected[f"noise_{name}"]) < MODEL_TOLERANCE, name


@pytest.mark.parametrize("case", names("sampling-*", "sampling-sd3"))
@pytest.mark.parametrize("mode", ["simple", "three_way"])
def test_sampling(case: str, mode: str) -> None:
    vectors = read_reference_vectors(case)
    assert relative_error(sigmas(vectors, mmdit(vectors)), vectors.expected["sigmas"]) < SIGMAS_TOLERANCE
    found = sampled(vectors, three_way=mode == "three_way")
    assert relative_error(found, vectors.expected[f"latents_{mode}"]) < SAMPLING_TOLERANCE
