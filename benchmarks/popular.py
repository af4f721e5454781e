"""The popular pack, ComfyUI_IPAdapter_plus, where `IPADAPTER_PLUS_DIR` names a checkout of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from . import host

FOLDER = os.environ.get("IPADAPTER_PLUS_DIR")
NAME = "IPAdapter_plus"


class Popular:
    """Its IPAdapter Advanced node over one MODEL, on IPAdapter+ weights."""

    def __init__(self, model: Any, widths: list[int], vision: Any = None) -> None:
        assert FOLDER is not None
        module = host.load_module("ipadapter_plus_pack", Path(FOLDER) / "__init__.py", package=True)
        self.node = module.NODE_CLASS_MAPPINGS["IPAdapterAdvanced"]()
        with torch.inference_mode():  # as the host has its nodes load files
            self.weights = host.adapter_weights(widths, instruct=False)
        self.model = model
        self.vision = vision or host.RandomVision()

    def apply(self, image: torch.Tensor | None = None, mask: torch.Tensor | None = None, **settings: Any) -> Any:
        image = host.picture() if image is None else image
        return self.node.apply_ipadapter(
            self.model, self.weights, image=image, clip_vision=self.vision, attn_mask=mask, weight=0.8, **settings
        )[0]
