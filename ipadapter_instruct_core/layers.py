"""The two layers that the projector is stacked from, and the norm of SD3.5's keys."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from .config import HEAD_WIDTH


class PerceiverAttention(nn.Module):
    """Latents attend to a source and to themselves; no bias, pre-norm (IPAdapter+, Fig. 3 of the paper)."""

    def __init__(self, width: int, heads: int, ops: Any = nn) -> None:
        super().__init__()
        inner = heads * HEAD_WIDTH
        self.heads = heads
        self.norm1 = ops.LayerNorm(width)
        self.norm2 = ops.LayerNorm(width)
        self.to_q = ops.Linear(width, inner, bias=False)
        self.to_kv = ops.Linear(width, inner * 2, bias=False)
        self.to_out = ops.Linear(inner, width, bias=False)

    def queries_keys_values(self, source: Tensor, latents: Tensor) -> list[Tensor]:
        """Each [B, H, N + T, d], the queries [B, H, T, d]."""
        latents = self.norm2(latents)
        queries = self.to_q(latents)
        keys, values = self.to_kv(torch.cat([self.norm1(source), latents], dim=1)).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (queries, keys, values)]

    def forward(self, source: Tensor, latents: Tensor) -> Tensor:
        """source [B, N, D] and latents [B, T, D] -> [B, T, D], without the residual."""
        queries, keys, values = self.queries_keys_values(source, latents)
        return self.to_out(scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


def feed_forward(width: int, mult: int, ops: Any = nn) -> nn.Sequential:
    """LayerNorm, widen, exact GELU, narrow; the order of the parts is the layout of the released files."""
    return nn.Sequential(
        ops.LayerNorm(width),
        ops.Linear(width, width * mult, bias=False),
        nn.GELU(),
        ops.Linear(width * mult, width, bias=False),
    )


class HeadNorm(nn.Module):
    """RMS norm of each head by itself, with SD3.5's own epsilon."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H*d] -> [B, T, H*d]."""
        # Not kept by the host's casting layers: follows the input's device and precision itself.
        weight = self.weight.to(x)
        return rms_norm(x.unflatten(-1, (-1, len(weight))), weight.shape, weight, eps=1e-6).flatten(-2)
