"""How the text-to-image model, and what is trained around it, are shown pictures: as noisy latents; and their loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from training.files import sha256
from training.frozen.attention import quick_gradients
from training.miniature.models import autoencoder
from training.miniature.models.base import SCHEDULE, TextToImage
from training.miniature.models.fit import in_bfloat16
from training.miniature.models.weights import path_of
from training.miniature.world.drawn import Pictures, pictures

LARGEST_WEIGHT = 8.0
LATENT_SHAPE = (4, 8, 8)


class DrawnFrom(Protocol):
    """The settings that choose the pictures of a run."""

    pictures: int
    seed: int
    device: str
    folder: Path


@torch.no_grad()
def drawn_latents(config: DrawnFrom) -> tuple[Pictures, Tensor]:
    """The pictures of a run, of any combination, and their latents [N, 4, 8, 8] on its device, both kept on disk."""
    data = pictures(config.pictures, config.seed, config.folder / "pictures", held_out=None)
    coder = sha256(path_of("autoencoder"))[:8]
    path = config.folder / "pictures" / f"latents-{data.name}-{coder}.pt"
    if not path.exists():
        model = autoencoder.load().to(config.device)
        parts = np.array_split(np.arange(len(data.factors)), -(-len(data.factors) // 500))
        with in_bfloat16(config.device):
            parts = [
                model.encode(data.batch(part).to(config.device)).float().cpu()
                for part in tqdm(parts, desc="encoding", mininterval=5)
            ]
        torch.save(torch.cat(parts), path)
    return data, torch.load(path, weights_only=True).to(config.device)


class SharedText:
    """Attention of a batch in which every text stands for several neighbouring rows: its keys are made once."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        times = len(query) // len(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2) for tensor in (query, key, value))
        if times > 1:
            key, value = key.repeat_interleave(times, dim=0), value.repeat_interleave(times, dim=0)
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def loss_weights(signal: Tensor) -> Tensor:
    """Weight of the noise error for each share of signal (cumulative alpha).

    As min-SNR-5 where there is little noise. Where there is much, a mistake about the picture hardly shows in the
    noise: such steps count up to eight times, as far as a prediction of velocity would have it.
    """
    ratio = signal / (1 - signal)
    return ((ratio + 1) / ratio).clamp(max=LARGEST_WEIGHT).minimum(6 / ratio)


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
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    with quick_gradients(noisy, precision):
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
