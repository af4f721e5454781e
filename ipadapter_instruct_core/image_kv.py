"""An adapter's layers: tokens -> keys and values, made once and used at every step, and what they add to an attention.

A *site* is an attention of the base model that a layer adds to. Whatever delivers a site's queries and output (a UNet's
cross-attention, a block of a transformer) calls the layer's ``addition``, and adds the result, times the adapter's
weight and mask, before the site's own output projection.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .attention import image_attention, split_heads
from .config import HEAD_WIDTH, AdapterConfig, Form
from .layers import HeadNorm


class ImageKeyValue(nn.Module):
    """The layer of a UNet's cross-attention, named as in the released files."""

    def __init__(self, token_width: int, width: int, ops: Any = nn) -> None:
        super().__init__()
        self.to_k_ip = ops.Linear(token_width, width, bias=False)
        self.to_v_ip = ops.Linear(token_width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T, O] -> keys and values [B, T, width]."""
        return self.to_k_ip(tokens), self.to_v_ip(tokens)

    def handed_on(self, tokens: Tensor) -> Tensor:
        """The tokens that the next layer sees."""
        return tokens

    def addition(
        self,
        queries: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        image: slice = slice(None),
        bias: Tensor | None = None,
    ) -> Tensor:
        """What the site's output is lacking at weight 1.

        Args:
            queries: [B, P, H*d], of all the site's positions, as the base model projected them.
            out: [B, P, H*d], the base's own attention before its output projection.
            keys, values: [B, H, T, d], of `forward`.
            image: which positions are the picture's.
            bias: [B or 1, 1, 1, T], added to the tokens' logits.

        Returns:
            [B, P, H*d].
        """
        return image_attention(queries, keys, values, bias)


class ImageStreamKeyValue(ImageKeyValue):
    """The layer of a joint attention of SD3.5: as plain as a UNet's, for the image's positions alone.

    The base norms its queries, so the keys are normed too, each head by itself; without, training would have to find
    the scale of their logits. SD3.5's heads are as wide as the projector's.
    """

    def __init__(self, token_width: int, width: int, ops: Any = nn) -> None:
        super().__init__(token_width, width, ops)
        self.norm_k_ip = HeadNorm(HEAD_WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T, O] -> keys and values [B, T, width]."""
        keys, values = super().forward(tokens)
        return self.norm_k_ip(keys), values

    def addition(
        self,
        queries: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        image: slice = slice(None),
        bias: Tensor | None = None,
    ) -> Tensor:
        """As `ImageKeyValue.addition`; zero at the text's positions."""
        first, last, _ = image.indices(out.shape[1])
        attended = image_attention(queries[:, image], keys, values, bias)
        return pad(attended, (0, 0, first, out.shape[1] - last))


class JointKeyValue(nn.Module):
    """The layer of a joint attention of SD3, named as in the released file (its transformer's code).

    Five things are as the authors' code has them and not as one would guess, and the weights depend on each:

    - tokens come through the base's embedding of the text, bias and all, and a layer hands them on through
      ``proj_encoder_passthrough_ip`` to the next one, so that each sees them changed by all before it;
    - the image's own keys and values are made of the attention's *output* (``to_k_ip``, ``to_v_ip``), not of its input;
    - text positions attend too, but are nobody's keys;
    - each stream has an output projection of its own, before which nothing is added and after which the base's follows;
    - tokens share one softmax with the image's keys, so that a token that stands there twice counts twice.
    """

    def __init__(self, token_width: int, width: int, ops: Any = nn) -> None:
        super().__init__()

        def square() -> Any:
            return ops.Linear(width, width, bias=False)  # tokens are as wide: the base has embedded them

        self.to_k_ip, self.to_v_ip = square(), square()
        self.add_k_proj_ip, self.add_v_proj_ip = square(), square()
        self.proj_ip, self.proj_encoder_hidden_states_ip = square(), square()
        self.proj_encoder_passthrough_ip = square()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded tokens [B, T, width] -> their keys and values [B, T, width]."""
        return self.add_k_proj_ip(tokens), self.add_v_proj_ip(tokens)

    def handed_on(self, tokens: Tensor) -> Tensor:
        """The tokens that the next layer sees."""
        return self.proj_encoder_passthrough_ip(tokens)

    def addition(
        self,
        queries: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        image: slice = slice(None),
        bias: Tensor | None = None,
    ) -> Tensor:
        """As `ImageKeyValue.addition`; the text's positions are those before or after the image's."""
        shown = out[:, image]
        heads, count = keys.shape[1], shown.shape[1]
        keys = torch.cat([split_heads(self.to_k_ip(shown), heads), keys], dim=2)
        values = torch.cat([split_heads(self.to_v_ip(shown), heads), values], dim=2)
        attended = image_attention(queries, keys, values, None if bias is None else pad(bias, (count, 0)))
        first, last, _ = image.indices(out.shape[1])
        text = self.proj_encoder_hidden_states_ip
        streams = ((text, slice(first)), (self.proj_ip, image), (text, slice(last, None)))
        streams = [(project, attended[:, part]) for project, part in streams]
        return torch.cat([project(part) for project, part in streams if part.shape[1]], dim=1)


Layer = ImageKeyValue | JointKeyValue
LAYERS = {Form.CROSS: ImageKeyValue, Form.IMAGE_STREAM: ImageStreamKeyValue, Form.JOINT: JointKeyValue}


def image_key_values(config: AdapterConfig, ops: Any = nn) -> nn.ModuleDict:
    """One layer an attention, under its number in the file ("1", "3", ... or "0", "2", ...), in key order."""
    layer = LAYERS[config.form]
    return nn.ModuleDict({str(n): layer(config.output_width, width, ops) for n, width in config.layers})
