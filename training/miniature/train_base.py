"""Train the text-to-image model on the autoencoder's latents of drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
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
from training.miniature.factors import Factors
from training.miniature.fit import Fit, best_device, fit
from training.miniature.pictures import Pictures, pictures
from training.miniature.weights import read, save
from training.miniature.words import tokenize

EMPTY_SHARE = 0.1  # captions left empty, for classifier-free guidance
LARGEST_WEIGHT = 8.0
LATENT_SHAPE = (4, 8, 8)


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


@torch.no_grad()
def encode(data: Pictures, path: Path, device: str) -> Tensor:
    """[N, 4, 8, 8] on ``device``: the latents of all pictures, kept on disk."""
    if not path.exists():
        model = autoencoder.load().to(device)
        parts = np.array_split(np.arange(len(data.factors)), -(-len(data.factors) // 500))
        parts = [
            model.encode(data.batch(part).to(device)).cpu() for part in tqdm(parts, desc="encoding", mininterval=5)
        ]
        torch.save(torch.cat(parts), path)
    return torch.load(path, weights_only=True).to(device)


def loss_weights(signal: Tensor) -> Tensor:
    """Weight of the noise error for each share of signal (cumulative alpha).

    As min-SNR-5 where there is little noise. Where there is much, a mistake about the picture hardly shows in the
    noise: such steps count up to eight times, as far as a prediction of velocity would have it.
    """
    ratio = signal / (1 - signal)
    return ((ratio + 1) / ratio).clamp(max=LARGEST_WEIGHT).minimum(6 / ratio)


def run(config: BaseConfig) -> None:
    torch.manual_seed(config.seed)
    data = pictures(config.pictures, config.seed, config.folder / "pictures")
    latents = encode(data, config.folder / "pictures" / f"latents-{config.seed}-{config.pictures}.pt", config.device)
    model = TextToImage()
    if config.init:
        model.load_state_dict(read("base"))
    model = model.to(config.device, memory_format=torch.channels_last).train()
    model.unet.set_attn_processor(SharedText())
    unet = torch.compile(model.unet) if config.compile else model.unet
    scheduler = DDIMScheduler(**SCHEDULE)
    weights = loss_weights(scheduler.alphas_cumprod).to(config.device)

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        timesteps, noise, text = batch["timesteps"], batch["noise"], model.read_tokens(batch["tokens"])
        clean = latents[batch["chosen"]].repeat_interleave(config.noises, dim=0)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        errors = (unet(noisy, timesteps, text).sample.float() - noise).square().mean(dim=(1, 2, 3))
        levels = errors.detach().view(config.captions, config.noises).mean(dim=0)
        return (weights[timesteps] * errors).mean(), {f"noise{n}": value for n, value in enumerate(levels)}

    settings = Fit(config.steps, config.rate, average=0.999, save_every=1000)
    draw = partial(draw_batch, config, data.factors)
    fit(model, draw, loss_of, settings, config.folder / "base", config.device, config.workers)
    about = json.dumps(asdict(config), default=str)
    print(save(model, "base", {"pictures_sha256": data.sha256, "settings": about}))


def draw_batch(config: BaseConfig, factors: Sequence[Factors], step: int) -> dict[str, Tensor]:
    """Numbers of the pictures and their captions' tokens ([C], [C, 77]); timesteps and noise ([C * noises, ...])."""
    generator = np.random.default_rng([config.seed, step])
    torch_generator = torch.Generator().manual_seed(int(generator.integers(2**62)))
    chosen = generator.integers(len(factors), size=config.captions)
    texts = [
        "" if generator.random() < EMPTY_SHARE else caption(factors[i], generator, random_omissions(generator))
        for i in chosen
    ]
    # The noise levels of one picture are spread over the whole range.
    spread = torch.rand(config.captions, config.noises, generator=torch_generator) + torch.arange(config.noises)
    timesteps = (spread / config.noises * 1000).long().clamp(max=999).flatten()
    noise = torch.randn(len(timesteps), *LATENT_SHAPE, generator=torch_generator)
    return {"chosen": torch.from_numpy(chosen), "tokens": tokenize(texts), "timesteps": timesteps, "noise": noise}
