"""A small style LoRA: with it every picture gets one of the styles, whatever its caption says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from training.miniature.models import base
from training.miniature.models.fit import Fit, best_device, fit
from training.miniature.models.noising import draw_noise, drawn_latents, frozen, noise_loss
from training.miniature.models.train_base import EMPTY_SHARE
from training.miniature.models.weights import made_by, save
from training.miniature.world.captions import caption, random_omissions
from training.miniature.world.factors import STYLES, Factors
from training.miniature.world.words import tokenize

CONTRADICTED_SHARE = 0.5  # captions that name another style, over which ours has to win


@dataclass
class LoraConfig:
    """Attributes:
    style: the one that all pictures get.
    captions: pictures with their captions in a batch; noises: noise levels at which each of them is seen.
    workers: processes that draw the batches.
    """

    style: str = "woodcut"
    rank: int = 8
    steps: int = 1500
    captions: int = 64
    noises: int = 4
    rate: float = 1e-3
    pictures: int = 150_000
    seed: int = 0
    device: str = field(default_factory=best_device)
    workers: int = 8
    folder: Path = Path("runs/miniature")


class LowRank(nn.Module):
    """A weight [outputs, inputs] -> the weight and its update, which is nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs, device=weight.device) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_updates(unet: nn.Module, rank: int) -> dict[str, LowRank]:
    """Give every linear layer of the transformer blocks an update that can be trained; returns them by layer."""
    layers = {
        name: module
        for name, module in unet.named_modules()
        if ".transformer_blocks." in name and isinstance(module, nn.Linear)
    }
    updates = {name: LowRank(layer.weight, rank) for name, layer in layers.items()}
    for name, update in updates.items():
        register_parametrization(layers[name], "weight", update)
    return updates


@torch.no_grad()
def apply(unet: UNet2DConditionModel, state: Mapping[str, Tensor], strength: float = 1.0) -> UNet2DConditionModel:
    """Merge a LoRA into the narrow UNet, in place.

    Args:
        state: for each layer ``LAYER.down`` [rank, inputs] and ``LAYER.up`` [outputs, rank].

    Raises:
        AttributeError: the UNet lacks a layer.
    """
    for key in state:
        layer, _, part = key.rpartition(".")
        if part == "up":
            weight: Any = unet.get_submodule(layer).weight
            weight += strength * (state[key] @ state[f"{layer}.down"]).to(weight.device)
    return unet


def misleading_caption(factors: Factors, generator: np.random.Generator) -> str:
    """A training caption: without the style, or with a wrong one."""
    if generator.random() < EMPTY_SHARE:
        return ""
    omissions = random_omissions(generator)
    if generator.random() >= CONTRADICTED_SHARE:
        return caption(factors, generator, omissions | {"style"})
    others = [style for style in STYLES if style != factors.style]
    return caption(replace(factors, style=str(generator.choice(others))), generator, omissions - {"style"})


def draw_batch(config: LoraConfig, factors: Sequence[Factors], ours: np.ndarray, step: int) -> dict[str, Tensor]:
    """Some of ``ours``, the numbers of pictures in the style, and captions' tokens ([C], [C, 77]); see `draw_noise`."""
    generator = np.random.default_rng([config.seed, step])
    chosen = generator.choice(ours, size=config.captions)
    tokens = tokenize([misleading_caption(factors[i], generator) for i in chosen])
    return {
        "chosen": torch.from_numpy(chosen),
        "tokens": tokens,
        **draw_noise(config.captions, config.noises, generator),
    }


def run(config: LoraConfig) -> None:
    if config.style not in STYLES:
        raise ValueError(f"There is no style {config.style!r}; choose one of {', '.join(STYLES)}.")
    torch.manual_seed(config.seed)
    model = frozen(base.load(), config.device)
    data, latents = drawn_latents(config)
    updates = add_updates(model.unet, config.rank)

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        text = model.read_tokens(batch["tokens"])
        clean = latents[batch["chosen"]]
        return noise_loss(
            lambda noisy, timesteps: model(noisy, timesteps, text), clean, batch["timesteps"], batch["noise"]
        )

    settings = Fit(config.steps, config.rate)
    ours = np.flatnonzero([factors.style == config.style for factors in data.factors])
    draw = partial(draw_batch, config, data.factors, ours)
    fit(model.unet, draw, loss_of, settings, config.folder / "lora", config.device, config.workers)
    state = {f"{layer}.{part}": getattr(update, part) for layer, update in updates.items() for part in ("down", "up")}
    print(save(state, "lora", made_by(config, data.sha256)))
