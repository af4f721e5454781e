"""Train the text-to-image model on the autoencoder's latents of drawn pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from training.miniature.models.base import TextToImage
from training.miniature.models.fit import Fit, best_device, channels_last, fit
from training.miniature.models.noising import SharedText, draw_noise, drawn_latents, noise_loss
from training.miniature.models.weights import made_by, read, save
from training.miniature.world.captions import caption, random_omissions
from training.miniature.world.factors import Factors
from training.miniature.world.words import tokenize

EMPTY_SHARE = 0.1  # captions left empty, for classifier-free guidance


@dataclass
class BaseConfig:
    """Attributes:
    captions: pictures with their captions in a batch; noises: noise levels at which each of them is seen.
    init: begin from the weights that come with the project.
    compile: the UNet, which pays off after some minutes on CUDA.
    """

    steps: int = 5000
    captions: int = 256
    noises: int = 4
    rate: float = 1e-3
    pictures: int = 150_000
    seed: int = 0
    init: bool = False
    compile: bool = False
    device: str = field(default_factory=best_device)
    workers: int = 8
    folder: Path = Path("runs/miniature")


def run(config: BaseConfig) -> None:
    torch.manual_seed(config.seed)
    data, latents = drawn_latents(config)
    model = TextToImage()
    if config.init:
        model.load_state_dict(read("base"))
    model = channels_last(model).to(config.device).train()
    model.unet.set_attn_processor(SharedText())
    unet = torch.compile(model.unet) if config.compile else model.unet

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        text = model.read_tokens(batch["tokens"])

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return unet(noisy, timesteps, text).sample

        return noise_loss(predict, latents[batch["chosen"]], batch["timesteps"], batch["noise"])

    settings = Fit(config.steps, config.rate, average=0.999)
    draw = partial(draw_batch, config, data.factors)
    fit(model, draw, loss_of, settings, config.folder / "base", config.device, config.workers)
    print(save(model, "base", made_by(config, data.sha256)))


def draw_batch(config: BaseConfig, factors: Sequence[Factors], step: int) -> dict[str, Tensor]:
    """Numbers of pictures and their captions' tokens ([C], [C, 77]); see `draw_noise`."""
    generator = np.random.default_rng([config.seed, step])
    noise = draw_noise(config.captions, config.noises, generator)
    chosen = generator.integers(len(factors), size=config.captions)
    texts = [
        "" if generator.random() < EMPTY_SHARE else caption(factors[i], generator, random_omissions(generator))
        for i in chosen
    ]
    return {"chosen": torch.from_numpy(chosen), "tokens": tokenize(texts), **noise}
