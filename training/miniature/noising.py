"""What is trained around the frozen text-to-image model sees as the model itself did: noisy latents, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from training.miniature.base import SCHEDULE, TextToImage
from training.miniature.train_base import LATENT_SHAPE, SharedText, loss_weights


def draw_noise(captions: int, noises: int, generator: np.random.Generator) -> dict[str, Tensor]:
    """For each picture ``timesteps`` [B, noises], spread over the whole range, and ``noise`` [B, noises, 4, 8, 8]."""
    torch_generator = torch.Generator().manual_seed(int(generator.integers(2**62)))
    spread = torch.rand(captions, noises, generator=torch_generator) + torch.arange(noises)
    return {
        "timesteps": (spread / noises * 1000).long().clamp(max=999),
        "noise": torch.randn(captions, noises, *LATENT_SHAPE, generator=torch_generator),
    }


def noise_loss(
    predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, timesteps: Tensor, noise: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted error of the noise found in latents [B, 4, 8, 8], and the plain error of each level.

    Args:
        predict: noisy latents [B * noises, 4, 8, 8] and their timesteps -> the noise in them.
        timesteps, noise: as `draw_noise` gives them.
    """
    signal = _signals(clean.device)[timesteps]
    share = signal[..., None, None, None]
    noisy = share.sqrt() * clean[:, None] + (1 - share).sqrt() * noise
    found = predict(noisy.flatten(0, 1).contiguous(memory_format=torch.channels_last), timesteps.flatten())
    errors = (found.float().view_as(noise) - noise).square().mean(dim=(2, 3, 4))
    levels = errors.detach().mean(dim=0)
    return (loss_weights(signal) * errors).mean(), {f"noise{n}": error for n, error in enumerate(levels)}


@cache
def _signals(device: torch.device) -> Tensor:
    return DDIMScheduler(**SCHEDULE).alphas_cumprod.to(device)


def frozen(model: TextToImage, device: str) -> TextToImage:
    """The model on its device, every text of a batch standing for the neighbouring rows that share it."""
    model.unet.set_attn_processor(SharedText())
    return model.to(device).requires_grad_(False).eval()
