"""The host's own UNet with our slots in it, against the reference vectors."""

from __future__ import annotations

import pytest
import torch
from reference_unet import unet_errors

TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    with torch.inference_mode():
        return unet_errors(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["noise_plain", "noise_adapted"])
def test_unet_sd15(errors: dict[str, float], name: str) -> None:
    assert errors[name] < TOLERANCE
