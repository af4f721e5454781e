"""What keeping the weights in half precision costs.

The weights before their rounding are not kept, so they are disturbed by errors of the same size and law once more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from ipadapter_instruct_core.adapter import Adapter
from torch import Tensor, nn
from training.miniature.models import autoencoder, base, clip, oracle
from training.miniature.models.weights import read
from training.miniature.world.captions import caption
from training.miniature.world.drawn import to_tensor
from training.miniature.world.factors import sample
from training.miniature.world.style import render


@dataclass
class RoundingConfig:
    """Attributes:
    count: pictures of held-out combinations.
    """

    count: int = 200
    seed: int = 0


@torch.no_grad()
def disturbed(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights are off by as much as half precision rounds: up to half of the last of its 11 bits."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        last_bit = torch.exp2(weight.abs().clamp(min=2**-14).log2().floor() - 10)
        weight.add_(last_bit * (torch.rand(weight.shape, generator=generator) - 0.5))
    return model


def change(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``one``."""
    return ((one - other).square().mean() / one.square().mean()).sqrt().item()


@torch.inference_mode()
def run(config: RoundingConfig) -> None:
    generator = np.random.default_rng(config.seed)
    factors = [sample(generator, True, person=n % 3 == 0) for n in range(config.count)]
    images = to_tensor(np.stack([render(one) for one in factors]))
    texts = [caption(one, generator) for one in factors]

    def both(model: nn.Module) -> tuple:
        return model, disturbed(model, config.seed)

    losses = []
    for coder in both(autoencoder.load()):
        errors = (coder.decode(coder.encode(images)).clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
        losses.append(-10 * errors.log10().mean().item())
    print(f"autoencoder: {losses[0]:.3f} dB, {losses[1]:.3f} dB after another rounding")
    latents = torch.randn(config.count, 4, 8, 8, generator=torch.Generator().manual_seed(config.seed))
    timesteps = torch.linspace(0, 999, config.count).long()
    noises = [model(latents, timesteps, model.read(texts)) for model in both(base.load())]
    print(f"base: its predictions of noise change by {change(*noises):.5f}")
    seen = [model.image_tokens(model.preprocess(images)) for model in both(clip.load())]
    print(f"CLIP: its picture tokens change by {change(*seen):.5f}")
    words = clip.load().instruction_tokens(["use the style"] * config.count)
    for name in ("adapter", "adapter-plain"):
        made = [model.image_proj(seen[0], words, None) for model in both(Adapter.from_state_dict(read(name)))]
        print(f"{name}: its tokens change by {change(*made):.5f}")
    scores = [
        min(oracle.accuracy(oracle.judge(model, images), oracle.labels(factors)).values())
        for model in both(oracle.load())
    ]
    print(f"oracle: right on {scores[0]:.4f} of its hardest factor, {scores[1]:.4f} after another rounding")
