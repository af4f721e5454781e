"""A frozen diffusers SD3 or SD3.5 transformer whose joint attentions also attend to adapter tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from ipadapter_instruct_core.attention import split_heads
from ipadapter_instruct_core.image_kv import Layer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Site(NamedTuple):
    """What a block's attention needs of an adapter.

    Attributes:
        layer: the adapter's, which the attention's own output runs through.
        keys, values: of the tokens, [B, T, width].
        weight: of the addition.
    """

    layer: Layer
    keys: Tensor
    values: Tensor
    weight: float = 1.0


class JointAttention:
    """A diffusers attention processor: the joint attention of image and text, plus the core's own addition.

    ``place`` is the block's in an adapter's key order, None for the blocks without a layer, and for the second
    attention of some of SD3.5's, which is of the image alone.
    """

    def __init__(self, place: int | None) -> None:
        self.place = place

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sites: Sequence[Site] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Image [B, N, width] and text [B, L, width] -> the same after the output projections."""
        assert attention_mask is None
        norms = (attn.norm_q, attn.norm_k)
        streams = [_projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), norms, attn.heads)]
        if encoder_hidden_states is not None:
            projections, norms = (
                (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                (attn.norm_added_q, attn.norm_added_k),
            )
            streams.append(_projected(encoder_hidden_states, projections, norms, attn.heads))
        queries, keys, values = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        query, key, value = (split_heads(part, attn.heads) for part in (queries, keys, values))
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        count = hidden_states.shape[1]
        if sites is not None and self.place is not None:
            out = out + _addition(sites[self.place], queries, out, attn.heads, count).to(out.dtype)
        image, text = out[:, :count], out[:, count:]
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _projected(
    states: Tensor, projections: Sequence[nn.Module], norms: Sequence[nn.Module | None], heads: int
) -> Iterator[Tensor]:
    """Queries, keys and values [B, P, width]; the first two normed, head by head, where the base does that."""
    for project, norm in zip(projections, (*norms, None), strict=True):
        part = project(states)
        yield part if norm is None else norm(part.unflatten(-1, (heads, -1))).flatten(2)


def _addition(site: Site, queries: Tensor, out: Tensor, heads: int, count: int) -> Tensor:
    """In the layer's precision, which is a trained one's float32, or what autocast makes of it."""
    dtype = next(site.layer.parameters()).dtype
    keys, values = (split_heads(part.to(dtype), heads) for part in (site.keys, site.values))
    return site.weight * site.layer.addition(queries.to(dtype), out.to(dtype), keys, values, slice(count))


def adapted_blocks(transformer: Any) -> list[tuple[int, int]]:
    """(number in an adapter file, width) of every second block, from the first on."""
    blocks = transformer.transformer_blocks
    return [(number, blocks[number].attn.to_q.out_features) for number in range(0, len(blocks), 2)]


def norms_queries(transformer: Any) -> bool:
    """Whether it is SD3.5's."""
    return transformer.config.qk_norm is not None


def prepare_transformer(transformer: Any) -> list[tuple[int, int]]:
    """Put our processors into every attention; returns `adapted_blocks`."""
    layers = adapted_blocks(transformer)
    place = {number: place for place, (number, _) in enumerate(layers)}
    for number, block in enumerate(transformer.transformer_blocks):
        block.attn.set_processor(JointAttention(place.get(number)))
        if block.attn2 is not None:
            block.attn2.set_processor(JointAttention(None))
    return layers


def predict(
    transformer: Any,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    sites: Sequence[Site] | None,
    added: dict[str, Tensor],
) -> Tensor:
    """One evaluation of a prepared transformer.

    Args:
        latents: noisy latents [B, 16, h, w].
        timesteps: 1000 times the share of noise, [B].
        text: CLIP's states, then T5's, [B, L, W].
        sites: an adapter's, or None for the bare model.
        added: ``pooled_projections`` [B, W].

    Returns:
        The velocity [B, 16, h, w], from picture to noise.
    """
    return transformer(
        latents,
        encoder_hidden_states=text,
        timestep=timesteps,
        joint_attention_kwargs=None if sites is None else {"sites": sites},
        return_dict=False,
        **added,
    )[0]
