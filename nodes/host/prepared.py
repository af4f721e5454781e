"""What an adapter makes of its tokens once a run, as the slots need it at every step."""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...ipadapter_instruct_core.config import Form
from ...ipadapter_instruct_core.guidance import Row
from ...ipadapter_instruct_core.image_kv import Layer
from .memory import HostedAdapter, module_dtype, on
from .sites import Site, sites


class Prepared(NamedTuple):
    """Of an application.

    Attributes:
        sites, layers: the model's, and the adapter's for each.
        key_values: for each row those of every layer, [N, T, width].
        bias: [1, 1, 1, T], of each token's logits; None for zeros.
        weight: what the layers' additions are yet to be multiplied with.
    """

    sites: list[Site]
    layers: list[Layer]
    key_values: dict[Row, list[tuple[Tensor, Tensor]]]
    bias: Tensor | None
    weight: float


def prepare(adapter: HostedAdapter, tokens: Mapping[Row, Tensor], model: ModelPatcher, weight: float) -> Prepared:
    """All rows' tokens [N, T, O] in one batch, where the host has put the adapter's weights; the model is loaded."""
    found = sites(model.model.diffusion_model)
    batch = torch.cat(list(tokens.values())).to(adapter.patcher.load_device, module_dtype(adapter.adapter))
    with on(batch.device):
        pairs = adapter.adapter.key_values(batch, partial(found[0].embed, model))
    if adapter.config.form is not Form.JOINT:
        # Exact, since nothing but tokens is attended to there, and a UNet's pixels are those of 0.1.0.
        pairs, weight = [(keys, values * weight) for keys, values in pairs], 1.0
    counts = [len(row) for row in tokens.values()]
    split = [(keys.split(counts), values.split(counts)) for keys, values in pairs]
    key_values = {row: [(keys[i], values[i]) for keys, values in split] for i, row in enumerate(tokens)}
    pictures = batch.shape[1] // adapter.config.token_count
    # The tokens of several weigh together as much as one's, beside whatever else is attended to.
    beside = adapter.config.form is Form.JOINT and pictures > 1
    bias = torch.full((1, 1, 1, batch.shape[1]), -math.log(pictures)) if beside else None
    return Prepared(found, adapter.adapter.layers, key_values, bias, weight)
