"""The narrow text-to-image model: a text encoder and a UNet in the shapes of SD1.5's, and how it paints.

Every width is a divisor of SD1.5's, so that repeating each channel gives SD1.5's own widths and the very same output:
160 channels -> 320, 192 of the text -> 768. See `expand`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from training.miniature.models.fit import channels_last
from training.miniature.models.weights import read
from training.miniature.world.words import END, LENGTH, START, tokenize, vocabulary
from transformers import CLIPTextConfig, CLIPTextModel

CHANNELS = 160
TEXT_WIDTH = 192
TEXT_LAYERS = 2

SCHEDULE = {  # SD1.5's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (CHANNELS, CHANNELS),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}


def text_config() -> CLIPTextConfig:
    """CLIP-L's text tower, a quarter as wide and a sixth as deep."""
    return CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=12,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )


class TextToImage(nn.Module):
    """Text encoder and UNet. The token embedding holds only the words that captions are made of."""

    numbers: Tensor
    text_encoder: Any
    unet: Any  # diffusers' UNet2DConditionModel

    def __init__(self) -> None:
        super().__init__()
        config = text_config()
        config.vocab_size = len(vocabulary())
        self.text_encoder = CLIPTextModel(config)
        self.unet = UNet2DConditionModel(**UNET)
        numbers = torch.zeros(END + 1, dtype=torch.int64)  # unknown words read as the first known one
        numbers[list(vocabulary())] = torch.arange(len(vocabulary()))
        self.register_buffer("numbers", numbers, persistent=False)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Captions -> the text encoder's last hidden states after its norm, [B, 77, 192]."""
        return self.read_tokens(tokenize(texts).to(self.numbers.device))

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """The same of tokens [B, 77]."""
        return self.text_encoder(self.numbers[tokens]).last_hidden_state

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Noisy latents [B, 4, 8, 8] -> the noise in them."""
        return self.unet(latents, timesteps, text).sample


def load() -> TextToImage:
    """The trained model that comes with the project."""
    model = TextToImage()
    model.load_state_dict(read("base"))
    return channels_last(model).requires_grad_(False).eval()


@torch.inference_mode()
def paint(model: TextToImage, texts: Sequence[str], seed: int, steps: int = 20, guidance: float = 4.0) -> Tensor:
    """Captions -> latents [B, 4, 8, 8], by DDIM and classifier-free guidance."""
    scheduler: Any = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    latents = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    latents = latents.contiguous(memory_format=torch.channels_last)
    text = model.read([*texts, *([""] * len(texts))])
    for timestep in scheduler.timesteps:
        wanted, without = model(torch.cat([latents, latents]), timestep, text).chunk(2)
        latents = scheduler.step(without + guidance * (wanted - without), timestep, latents).prev_sample
    return latents
