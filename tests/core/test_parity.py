"""Our modules against outputs of the authors' own (tests/assets/parity/README.md), one test a file.

The base model's case, unet-sd15, runs in the real host: tests/host/test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from ipadapter_instruct_core.config import AdapterConfig
from ipadapter_instruct_core.guidance import Row, simple, three_way
from ipadapter_instruct_core.projector import Projector
from reference_vectors import FOLDER, read_reference_vectors, relative_error

CASES = ["projector-sd15", "projector-sdxl", "projector-sd3", "projector-paper"]
CASES += sorted({path.stem for path in FOLDER.glob("projector-*.safetensors")} - set(CASES))
PROJECTOR_TOLERANCE, GUIDANCE_TOLERANCE = 1e-4, 1e-6


@pytest.mark.parametrize("case", CASES)
def test_projector(case: str) -> None:
    vectors = read_reference_vectors(case)
    weights = {key.replace("_big.", "."): value for key, value in vectors.weights().items()}  # SD3's names
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
