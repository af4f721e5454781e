"""A small scribble ControlNet: white lines on black say where things are, in whatever style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image, ImageFilter
from torch import Tensor
from training.miniature.models import base
from training.miniature.models.fit import Fit, best_device, fit
from training.miniature.models.noising import SharedText, draw_noise, drawn_latents, frozen, noise_loss
from training.miniature.models.weights import made_by, read, save
from training.miniature.world.captions import caption, random_omissions
from training.miniature.world.draw import SCALE
from training.miniature.world.draw import draw as draw_regions
from training.miniature.world.drawn import to_tensor
from training.miniature.world.factors import Factors
from training.miniature.world.words import tokenize

# What captions do not say has to be read from the lines.
EMPTY_SHARE = 0.2
PLACELESS_SHARE = 0.5


@dataclass
class ControlNetConfig:
    """Attributes:
    captions: pictures with their captions in a batch; noises: noise levels at which each of them is seen.
    init: go on from the weights that come with the project.
    workers: processes that draw the batches.
    """

    steps: int = 3000
    captions: int = 64
    noises: int = 4
    rate: float = 5e-4
    pictures: int = 150_000
    seed: int = 0
    init: bool = False
    device: str = field(default_factory=best_device)
    workers: int = 8
    folder: Path = Path("runs/miniature")


def scribble(factors: Factors) -> np.ndarray:
    """The lines between the regions of a picture, white on black and one pixel wide: [64, 64, 3] uint8."""
    regions = Image.fromarray(draw_regions(factors))
    highest, lowest = (np.asarray(regions.filter(of(3))) for of in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    # Both sides of a border differ: two pixels at the size of the regions.
    lines = (highest != lowest)[::SCALE, ::SCALE]
    return np.where(lines, np.uint8(255), np.uint8(0))[..., None].repeat(3, axis=2)


def placeless_caption(factors: Factors, generator: np.random.Generator) -> str:
    """A training caption: often empty or without a word of the layout."""
    if generator.random() < EMPTY_SHARE:
        return ""
    without = {"layout"} if generator.random() < PLACELESS_SHARE else set()
    return caption(factors, generator, random_omissions(generator) | without)


def denoise(
    controlnet: ControlNetModel,
    unet: UNet2DConditionModel,
    noisy: Tensor,
    timesteps: Tensor,
    text: Tensor,
    hint: Tensor,
) -> Tensor:
    """Noisy latents [B, 4, 8, 8] under a hint [B, 3, 64, 64] in 0-1 -> the noise in them."""
    down, middle = controlnet(noisy, timesteps, text, hint, return_dict=False)
    return unet(
        noisy, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample


def load() -> ControlNetModel:
    """The trained ControlNet that comes with the project, for diffusers."""
    unet = UNet2DConditionModel(**base.UNET)
    controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    controlnet.load_state_dict(read("controlnet"))
    return controlnet.requires_grad_(False).eval()


def draw_batch(config: ControlNetConfig, factors: Sequence[Factors], step: int) -> dict[str, Tensor]:
    """Numbers of pictures, their captions' tokens and hints ([C], [C, 77], [C, 3, 64, 64]); see `draw_noise`."""
    generator = np.random.default_rng([config.seed, step])
    chosen = generator.integers(len(factors), size=config.captions)
    return {
        "chosen": torch.from_numpy(chosen),
        "tokens": tokenize([placeless_caption(factors[i], generator) for i in chosen]),
        "hints": to_tensor(np.stack([scribble(factors[i]) for i in chosen])),
        **draw_noise(config.captions, config.noises, generator),
    }


def run(config: ControlNetConfig) -> None:
    torch.manual_seed(config.seed)
    model = frozen(base.load(), config.device)
    data, latents = drawn_latents(config)
    controlnet: Any = load() if config.init else ControlNetModel.from_unet(model.unet)
    controlnet.set_attn_processor(SharedText())
    controlnet = controlnet.to(config.device, memory_format=torch.channels_last).requires_grad_(True).train()

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        text, hints = model.read_tokens(batch["tokens"]), batch["hints"].repeat_interleave(config.noises, dim=0)

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return denoise(controlnet, model.unet, noisy, timesteps, text, hints)

        return noise_loss(predict, latents[batch["chosen"]], batch["timesteps"], batch["noise"])

    settings = Fit(config.steps, config.rate, average=0.998)
    draw = partial(draw_batch, config, data.factors)
    fit(controlnet, draw, loss_of, settings, config.folder / "controlnet", config.device, config.workers)
    print(save(controlnet, "controlnet", made_by(config, data.sha256)))
