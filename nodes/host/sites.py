"""The sites of a MODEL: its attentions that an adapter adds to, in the order of the adapter files' numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...ipadapter_instruct_core.config import Form
from .memory import on

SlotKey = tuple[str, int] | tuple[str, int, int]


@dataclass(frozen=True)
class Site:
    """One of them: its block in the host's naming, its width, that of the text it reads, and its heads.

    Attributes:
        group: the host's name for its kind of replacement.
        form: of the adapters that it takes.
    """

    block: tuple[str, int]
    width: int
    text_width: int
    heads: int
    form: Form

    group: ClassVar[str]

    def key(self, replacements: dict) -> SlotKey:
        """The key to patch."""
        return self.block

    def embed(self, model: ModelPatcher, tokens: Tensor) -> Tensor:
        """Adapter tokens [B, T, O] as the model embeds its text."""
        return tokens


@dataclass(frozen=True)
class CrossAttention(Site):
    """A text cross-attention of a UNet; ``alone`` where it is its block's only one."""

    index: int
    alone: bool

    group = "attn2"

    def key(self, replacements: dict) -> SlotKey:
        """The block's, as other packs use it for one-layer transformers, unless the layer's own key is taken, which
        the host looks up first."""
        own = (*self.block, self.index)
        return own if own in replacements or not self.alone else self.block


class ImageStream(Site):
    """A block of SD3.5's transformer, in which text and picture attend to each other; the picture's part of it."""

    group = "dit"


class JointBlock(Site):
    """Such a block of SD3's, with the text's part too."""

    group = "dit"

    def embed(self, model: ModelPatcher, tokens: Tensor) -> Tensor:
        """[B, T, O] -> [B, T, width] by the loaded module itself, so that what the host does to its weights, LoRA
        included, holds for tokens too."""
        embedder = model.model.diffusion_model.context_embedder
        with on(model.load_device):
            return embedder(tokens.to(model.load_device, compute_dtype(model.model))).to(tokens)


def sites(diffusion_model: nn.Module) -> list[Site]:
    """Of a UNet, its text cross-attentions: down, up, middle. Of SD3's or SD3.5's transformer, every second block from
    the first.

    Empty for other models.
    """
    if hasattr(diffusion_model, "input_blocks"):
        return list(_cross_attentions(diffusion_model))
    if _is_mmdit(diffusion_model):
        return list(_joint_blocks(diffusion_model))
    return []


def _cross_attentions(unet: Any) -> Iterator[Site]:
    """The middle block is ``("middle", 0)``; the ``("middle", 1)`` that is seen elsewhere is never called."""
    stages = [("input", i, block) for i, block in enumerate(unet.input_blocks)]
    stages += [("output", i, block) for i, block in enumerate(unet.output_blocks)]
    if getattr(unet, "middle_block", None) is not None:
        stages.append(("middle", 0, unet.middle_block))
    for name, number, block in stages:
        for module in block:
            layers = getattr(module, "transformer_blocks", [])
            for index, layer in enumerate(layers):
                attention = getattr(layer, "attn2", None)
                if attention is not None:
                    widths = attention.to_q.out_features, attention.to_k.in_features
                    yield CrossAttention((name, number), *widths, attention.heads, Form.CROSS, index, len(layers) == 1)


def _joint_blocks(transformer: Any) -> Iterator[Site]:
    """SD3.5's may have the very shapes of SD3's, but norm queries, so that SD3's weights mean nothing to them."""
    text_width = getattr(transformer.context_embedder, "in_features", 0)
    normed = not isinstance(transformer.joint_blocks[0].x_block.attn.ln_q, nn.Identity)
    kind, form = (ImageStream, Form.IMAGE_STREAM) if normed else (JointBlock, Form.JOINT)
    for number in range(0, len(transformer.joint_blocks), 2):
        attention = transformer.joint_blocks[number].x_block.attn
        width = attention.proj.out_features
        yield kind(("double_block", number), width, text_width, attention.num_heads, form)


def compute_dtype(model: Any) -> torch.dtype:
    """The precision in which the host evaluates a model."""
    return model.manual_cast_dtype or model.get_dtype()


def _is_mmdit(diffusion_model: Any) -> bool:
    return hasattr(next(iter(getattr(diffusion_model, "joint_blocks", ())), None), "x_block")
