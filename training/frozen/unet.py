"""A frozen diffusers UNet whose cross-attentions also attend to adapter tokens (paper, Fig. 2)."""

from collections.abc import Sequence
from typing import Any

from ipadapter_instruct_core.attention import image_attention, split_heads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Keys and values [B, T, width] of every cross-attention, in the order of an adapter file's numbers.
ImageKeyValues = Sequence[tuple[Tensor, Tensor] | None]


class DecoupledAttention:
    """A diffusers attention processor: text attention plus image attention, with the core's own arithmetic.

    ``layer`` is the cross-attention's place in an adapter's key order, None for self-attentions.
    """

    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_key_values: ImageKeyValues | None = None,
    ) -> Tensor:
        """hidden_states [B, P, width], encoder_hidden_states [B, L, W] -> [B, P, width]."""
        assert attention_mask is None and attn.group_norm is None and not attn.residual_connection
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        queries = attn.to_q(hidden_states)
        keys, values = (split_heads(project(context), attn.heads) for project in (attn.to_k, attn.to_v))
        out = scaled_dot_product_attention(split_heads(queries, attn.heads), keys, values).transpose(1, 2).flatten(2)
        image = image_key_values[self.layer] if image_key_values is not None and self.layer is not None else None
        if image is not None:
            image_keys, image_values = (split_heads(part.to(queries.dtype), attn.heads) for part in image)
            out = out + image_attention(queries, image_keys, image_values)
        return attn.to_out[1](attn.to_out[0](out))


def cross_attentions(unet: Any) -> list[tuple[int, int]]:
    """(number in an adapter file, width) of every cross-attention: numbers count diffusers' processors, down, up, mid.

    Raises:
        ValueError: self- and cross-attentions do not alternate, so that the released numbering does not fit.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    found = [(n, name) for n, name in enumerate(names) if name.endswith("attn2")]
    if [n for n, _ in found] != list(range(1, len(names), 2)):
        raise ValueError(
            "The base's UNet is not built of pairs of self- and cross-attention, as SD1.5's and SDXL's are."
        )
    return [(n, unet.get_submodule(name).to_q.out_features) for n, name in found]


def prepare_unet(unet: Any) -> list[tuple[int, int]]:
    """Put our processors into every attention; returns `cross_attentions`."""
    layers = cross_attentions(unet)
    place = {number: layer for layer, (number, _) in enumerate(layers)}
    unet.set_attn_processor(
        {name: DecoupledAttention(place.get(number)) for number, name in enumerate(unet.attn_processors)}
    )
    return layers


def predict(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    image: ImageKeyValues | None,
    added: dict[str, Tensor] | None = None,
    residuals: tuple[Sequence[Tensor], Tensor] | None = None,
) -> Tensor:
    """One evaluation of a prepared UNet.

    Args:
        latents: noisy latents [B, 4, h, w].
        timesteps: [B].
        text: context [B, L, W].
        image: keys and values of the adapter, or None for the bare model.
        added: SDXL's ``text_embeds`` [B, 1280] and ``time_ids`` [B, 6].
        residuals: a ControlNet's, for the down blocks and for the middle block.

    Returns:
        The model's prediction [B, 4, h, w].
    """
    down, middle = residuals if residuals is not None else (None, None)
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=text,
        added_cond_kwargs=added,
        cross_attention_kwargs=None if image is None else {"image_key_values": image},
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]
