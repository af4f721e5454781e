"""Train the text-to-image model on the autoencoder's latents of drawn pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from training.miniature import autoencoder
from training.miniature.base import SCHEDULE, TextToImage
from training.miniature.captions import caption, random_omissions
from training.miniature.fit import Fit, fit
from training.miniature.pictures import Pictures, pictures
from training.miniature.weights import read, save

EMPTY_SHARE = 0.1  # captions left empty, for classifier-free guidance
LARGEST_WEIGHT = 8.0


@dataclass
class BaseConfig:
    """Attributes:
    captions: pictures with their captions in a batch; noises: noise levels at which each of them is seen.
    init: begin from the weights that come with the project.
    """

    steps: int = 4500
    captions: int = 10
    noises: int = 4
    rate: float = 1e-3
    pictures: int = 30_000
    seed: int = 0
    init: bool = False
    folder: Path = Path("runs/miniature")


class SharedText:
    """Attention of a batch in which every text stands for several neighbouring rows: its keys are made once."""

    def __call__(
        self,
        attn: Attention,
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


@torch.inference_mode()
def encode(data: Pictures, path: Path) -> Tensor:
    """[N, 4, 8, 8]: the latents of all pictures, kept on disk."""
    if not path.exists():
        model = autoencoder.load()
        indices = np.arange(len(data.factors))
        parts = [model.encode(data.batch(part)) for part in tqdm(np.array_split(indices, len(indices) // 100))]
        torch.save(torch.cat(parts), path)
    return torch.load(path, weights_only=True)


def loss_weights(signal: Tensor) -> Tensor:
    """Weight of the noise error for each share of signal (cumulative alpha).

    As min-SNR-5 where there is little noise. Where there is much, a mistake about the picture hardly shows in the
    noise: such steps count up to eight times, as far as a prediction of velocity would have it.
    """
    ratio = signal / (1 - signal)
    return torch.minimum((ratio + 1) / ratio, torch.tensor(LARGEST_WEIGHT)).minimum(6 / ratio)


def run(config: BaseConfig) -> None:
    torch.manual_seed(config.seed)
    data = pictures(config.pictures, config.seed, config.folder / "pictures")
    latents = encode(data, config.folder / "pictures" / f"latents-{config.seed}-{config.pictures}.pt")
    model = TextToImage()
    if config.init:
        model.load_state_dict(read("base"))
    model = model.to(memory_format=torch.channels_last).train()
    model.unet.set_attn_processor(SharedText())
    scheduler = DDIMScheduler(**SCHEDULE)
    weights = loss_weights(scheduler.alphas_cumprod)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = np.random.default_rng([config.seed, step])
        torch_generator = torch.Generator().manual_seed(int(generator.integers(2**62)))
        chosen = generator.integers(len(data.factors), size=config.captions)
        texts = [
            "" if generator.random() < EMPTY_SHARE else caption(data.factors[i], generator, random_omissions(generator))
            for i in chosen
        ]
        # The noise levels of one picture are spread over the whole range.
        spread = torch.rand(config.captions, config.noises, generator=torch_generator) + torch.arange(config.noises)
        timesteps = (spread / config.noises * 1000).long().clamp(max=999).flatten()
        clean = latents[chosen].repeat_interleave(config.noises, dim=0)
        noise = torch.randn(clean.shape, generator=torch_generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        errors = (model(noisy, timesteps, model.read(texts)) - noise).square().mean(dim=(1, 2, 3))
        levels = errors.detach().view(config.captions, config.noises).mean(dim=0)
        return (weights[timesteps] * errors).mean(), {f"noise{n}": round(v.item(), 5) for n, v in enumerate(levels)}

    fit(model, loss_of, Fit(config.steps, config.rate, average=0.998), config.folder / "base")
    settings = json.dumps(asdict(config), default=str)
    print(save(model, "base", {"pictures_sha256": data.sha256, "settings": settings}))
