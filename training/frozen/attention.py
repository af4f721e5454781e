"""Which kernel attention runs with where gradients flow through it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 16 * 16
"""Positions of latents up to which plain products are taken on a processor."""


def quick_gradients(latents: Tensor, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A context in which to run a network of ``dtype`` on ``latents`` [..., h, w], and its gradient.

    In half as many bits torch's fused attention takes three to ten times as long for its gradient on a processor where
    sequences are short, as measured on one with matrix tiles (80 samples of 8 × 8 positions, torch 2.13: 69 ms for 21;
    one of 64 × 64: 0.5 s for 1.4, the other way about).
    """
    slow = latents.device.type == "cpu" and dtype != torch.float32 and latents.shape[-2:].numel() <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()
