"""Small adapters: every part of a real one, in a few thousand weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, Base, Form, InstructionEncoder

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
    instruction_encoder=InstructionEncoder.OPEN_CLIP,
)
PAPER = replace(RELEASED, prompt_width=None)
PLUS = replace(RELEASED, prompt_width=None, instruction_width=None, instruction_encoder=InstructionEncoder.CLIP_L)
JOINT = replace(RELEASED, layers=((0, 64), (2, 64), (4, 64)), base=Base.SD3, form=Form.JOINT, output_suffix="_big")

STREAM = replace(RELEASED, layers=JOINT.layers, base=Base.SD35, form=Form.IMAGE_STREAM)


def random_adapter(config: AdapterConfig, seed: int = 0) -> Adapter:
    """An adapter in which no weight is a constant, norms' included."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapter.requires_grad_(False)
