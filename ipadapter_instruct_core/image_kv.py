"""Adapter tokens -> keys and values of every cross-attention, made once and used at every step."""

from typing import Any

from torch import Tensor, nn

from .config import AdapterConfig


class ImageKeyValue(nn.Module):
    """The key and value projections of one cross-attention, named as in the released files."""

    def __init__(self, token_width: int, width: int, ops: Any = nn) -> None:
        super().__init__()
        self.to_k_ip = ops.Linear(token_width, width, bias=False)
        self.to_v_ip = ops.Linear(token_width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T, O] -> keys and values [B, T, width]."""
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


def image_key_values(config: AdapterConfig, ops: Any = nn) -> nn.ModuleDict:
    """One `ImageKeyValue` a cross-attention, under its number in the file ("1", "3", ...), in key order."""
    return nn.ModuleDict({str(n): ImageKeyValue(config.output_width, width, ops) for n, width in config.layers})
