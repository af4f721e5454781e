"""Training's transformer, on diffusers, against what the authors' own modules gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers_twin import sd3_transformer
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, Base, Form
from reference_vectors import names, read_reference_vectors, relative_error
from training.frozen.network import embedding, predict, prepare, sites

TOLERANCE = 5e-4


@torch.no_grad()
@pytest.mark.parametrize("case", names("mmdit-*", "mmdit-sd3"))
def test_mmdit_on_diffusers(case: str, tmp_path: Path) -> None:
    vectors = read_reference_vectors(case)
    weights, inputs = vectors.weights("mmdit_keys", "mmdit_salt"), vectors.inputs
    width = len(weights["context_embedder.weight"])
    blocks = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("joint_blocks."))
    transformer = sd3_transformer(weights, tmp_path, blocks, width)
    layers = tuple(prepare(transformer))
    wide = inputs["tokens"].shape[-1]
    adapter = Adapter(
        AdapterConfig(width=64, heads=1, depth=1, output_width=wide, base=Base.SD3, layers=layers, form=Form.JOINT)
    )
    adapter.ip_adapter.load_state_dict(vectors.weights("ip_keys", "ip_salt"), strict=True)
    shown = sites(adapter, inputs["tokens"], vectors.value("scale"), embedding(transformer))
    times, added = torch.tensor(vectors.value("timestep")), {"pooled_projections": inputs["pooled"]}
    for name, image in {"plain": None, "adapted": shown}.items():
        found = predict(transformer, inputs["latents"], times, inputs["context"], image, added)
        assert relative_error(found, vectors.expected[f"noise_{name}"]) < TOLERANCE, name
