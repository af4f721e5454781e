"""Decoupled cross-attention: what the picture adds to the text's attention (paper, Fig. 2)."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*d] -> [B, H, T, d], a view."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)  # `unflatten` takes longer to say the same


def image_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of positions to adapter tokens.

    torch's own attention rather than the host's chosen backend: some of those refuse 16 keys or our
    head sizes, or return wrong pictures for them.

    Args:
        queries: [B, P, H*d], as the base model projected them.
        keys, values: [B, H, T, d], split beforehand.
        bias: [B or 1, 1, 1, T], added to each key's logits.

    Returns:
        [B, P, H*d], to be added to the text attention's output.
    """
    out = scaled_dot_product_attention(split_heads(queries, keys.shape[1]), keys, values, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)
