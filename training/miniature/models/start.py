"""The adapter that training starts from: an IPAdapter+ of the miniature's size, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import save
from ipadapter_instruct_core.config import HEAD_WIDTH, AdapterConfig
from training.frozen.unet import cross_attentions
from training.miniature.models import clip
from training.miniature.models.base import TEXT_WIDTH, TextToImage

WIDTH = 192


@dataclass
class StartConfig:
    """Attributes:
    out: the file.
    """

    out: Path = Path("runs/miniature/start.safetensors")
    seed: int = 0


def run(config: StartConfig) -> None:
    torch.manual_seed(config.seed)
    sizes = AdapterConfig(
        image_width=clip.CONFIG["vision_cfg"]["width"],
        width=WIDTH,
        heads=WIDTH // HEAD_WIDTH,
        output_width=TEXT_WIDTH,
        instruction_width=None,
        prompt_width=None,
        layers=tuple(cross_attentions(TextToImage().unet)),
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save(config.out, Adapter(sizes))
    print(config.out)
