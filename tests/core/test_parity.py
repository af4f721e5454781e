"""Our modules against outputs of the authors' own (tests/assets/parity/README.md), one test a file.

The base models' cases, whole networks and sampling, run in the real host: tests/host/test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from ipadapter_instruct_core.config import AdapterConfig
from ipadapter_instruct_core.guidance import Row, simple, three_way
from ipadapter_instruct_core.projector import Projector
from joint_attention import joint_attention
from reference_vectors import names, read_reference_vectors, relative_error

PROJECTORS = names("projector-*", "projector-sd15", "projector-sdxl", "projector-sd3", "projector-paper")
PROJECTOR_TOLERANCE, GUIDANCE_TOLERANCE, ATTENTION_TOLERANCE = 1e-4, 1e-6, 1e-4


@pytest.mark.parametrize("case", PROJECTORS)
def test_projector(case: str) -> None:
    vectors = read_reference_vectors(case)
    weights = vectors.weights()
    projector = Projector(AdapterConfig.from_state_dict({f"image_proj.{key}": w for key, w in weights.items()}))
    projector.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        output = projector(**vectors.inputs)
    assert relative_error(output, vectors.expected["output"]) < PROJECTOR_TOLERANCE


def test_guidance() -> None:
    vectors = read_reference_vectors("guidance")
    rows = {Row(name): prediction for name, prediction in vectors.inputs.items()}
    text, instruct, image = (vectors.value(f"{name}_scale") for name in ("text", "instruct", "image"))
    combined = three_way(rows, text_scale=text, instruct_scale=instruct, image_scale=image)
    assert relative_error(combined, vectors.expected["three_way"]) < GUIDANCE_TOLERANCE
    assert relative_error(simple(rows, text), vectors.expected["simple"]) < GUIDANCE_TOLERANCE


@pytest.mark.parametrize("case", names("*-joint-attention*", "sd3-joint-attention"))
@pytest.mark.parametrize("text_first", [True, False], ids=["text first", "image first"])
def test_joint_attention(case: str, text_first: bool) -> None:
    """As the host lays out the positions, and as diffusers does."""
    vectors = read_reference_vectors(case)
    with torch.inference_mode():
        found = joint_attention(vectors, text_first) | {
            f"{name}_plain" if "joint" not in name else name.replace("_joint", "_plain_joint"): value
            for name, value in joint_attention(vectors, text_first, scale=0.0).items()
            if name != "tokens_next"
        }
    assert found.keys() == vectors.expected.keys()
    for name, expected in vectors.expected.items():
        assert relative_error(found[name], expected) < ATTENTION_TOLERANCE, name
