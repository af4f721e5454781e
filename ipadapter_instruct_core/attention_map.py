"""Where the adapter's tokens look in a picture: the projector's attention to image patches."""

from math import isqrt

import torch
from torch import Tensor

from .layers import PerceiverAttention
from .projector import Projector


def attention_shares(
    projector: Projector, image: Tensor, instruction: Tensor | None = None, prompt: Tensor | None = None
) -> Tensor:
    """The share of the image attention that each patch gets, as a mean over layers, heads and adapter tokens.

    The tokens attend to themselves too, and to the tower's class token; what goes there is left out. Attention tells
    what was read, not what came of it.

    Args:
        image, instruction, prompt: as in `Projector.forward`.

    Returns:
        [B, S, S] for S x S patches; adds up to one in each picture.
    """
    layers: list[Tensor] = []

    def look(module: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        assert isinstance(module, PerceiverAttention)
        queries, keys, _ = module.queries_keys_values(*inputs)
        weights = (queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).float().softmax(dim=-1)
        layers.append(weights[..., : image.shape[1]].mean(dim=(1, 2)))

    hooks = [layer[0].register_forward_pre_hook(look) for layer in projector.layers]  # type: ignore[index]
    try:
        projector(image, instruction, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    side = isqrt(image.shape[1])
    patches = torch.stack(layers).mean(dim=0)[:, image.shape[1] - side * side :]
    return (patches / patches.sum(dim=1, keepdim=True)).unflatten(1, (side, side))
