"""A block's joint attention of SD3, spelled out in torch, with our layer's addition in it."""

from __future__ import annotations

import torch
from ipadapter_instruct_core.attention import split_heads
from ipadapter_instruct_core.image_kv import JointKeyValue
from reference_vectors import ReferenceVectors
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention


def joint_attention(vectors: ReferenceVectors, text_first: bool, scale: float | None = None) -> dict[str, Tensor]:
    """The outputs that the vectors expect, under their names; at their scale, or at another."""
    weights, inputs = vectors.weights("attn_keys", "attn_salt"), vectors.inputs
    heads, scale = vectors.value("heads"), vectors.value("scale") if scale is None else scale
    streams = {
        "text": (inputs["text"], ("add_q_proj", "add_k_proj", "add_v_proj")),
        "image": (inputs["image"], ("to_q", "to_k", "to_v")),
    }
    order = list(streams) if text_first else list(reversed(streams))

    def project(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    q, k, v = (torch.cat([project(streams[s][1][i], streams[s][0]) for s in order], dim=1) for i in range(3))
    out = scaled_dot_product_attention(*(split_heads(x, heads) for x in (q, k, v))).transpose(1, 2).flatten(2)
    layer = JointKeyValue(inputs["tokens"].shape[-1], out.shape[-1])
    layer.load_state_dict(vectors.weights("ip_keys", "ip_salt"), strict=True)
    lengths = [streams[s][0].shape[1] for s in order]
    first = lengths[0] if text_first else 0
    image = slice(first, first + inputs["image"].shape[1])
    keys, values = (split_heads(x, heads) for x in layer(inputs["tokens"]))
    out = out + scale * layer.addition(q, out, keys, values, image)
    joint = dict(zip(order, out.split(lengths, dim=1), strict=True))
    return {
        **{f"{stream}_joint": joint[stream] for stream in streams},
        "image": project("to_out.0", joint["image"]),
        "text": project("to_add_out", joint["text"]),
        "tokens_next": layer.handed_on(inputs["tokens"]),
    }
