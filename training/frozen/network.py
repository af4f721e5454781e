"""The frozen network that makes pictures, whichever it is: a UNet, or the transformer of SD3 or SD3.5."""

from collections.abc import Callable, Sequence
from typing import Any

from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import Form
from torch import Tensor
from training.frozen import transformer, unet
from training.frozen.transformer import Site
from training.frozen.unet import ImageKeyValues

Sites = ImageKeyValues | Sequence[Site]  # what a network reads of an adapter


def is_joint(network: Any) -> bool:
    """Whether image and text attend jointly, as in SD3's transformer."""
    return hasattr(network, "context_embedder")


def prepare(network: Any) -> list[tuple[int, int]]:
    """Put our processors into every attention; (number in an adapter file, width) of those that an adapter adds to."""
    return transformer.prepare_transformer(network) if is_joint(network) else unet.prepare_unet(network)


def embedding(network: Any) -> Callable[[Tensor], Tensor]:
    """How adapter tokens come to a network: through SD3's embedding of the text, and to SD3.5 and a UNet as they
    are."""
    if not is_joint(network) or transformer.norms_queries(network):
        return lambda tokens: tokens
    embedder = network.context_embedder
    return lambda tokens: embedder(tokens.to(embedder.weight.dtype)).to(tokens.dtype)


def sites(
    adapter: Adapter, tokens: Tensor, weight: float = 1.0, embed: Callable[[Tensor], Tensor] = lambda tokens: tokens
) -> Sites:
    """What a network reads of adapter tokens [B, T, O]; ``embed`` as `embedding` gives it."""
    pairs = adapter.key_values(tokens, embed)
    if adapter.config.form is not Form.CROSS:
        return [Site(layer, *pair, weight) for layer, pair in zip(adapter.layers, pairs, strict=True)]
    return [(keys, values * weight) for keys, values in pairs]


def predict(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    image: Sites | None,
    added: dict[str, Tensor] | None = None,
    residuals: tuple[Sequence[Tensor], Tensor] | None = None,
) -> Tensor:
    """One evaluation of a prepared network, as `unet.predict` or `transformer.predict` say."""
    read: Any = image  # of either kind, as the network is
    if is_joint(network):
        assert residuals is None and added is not None
        return transformer.predict(network, latents, timesteps, text, read, added)
    return unet.predict(network, latents, timesteps, text, read, added, residuals)
