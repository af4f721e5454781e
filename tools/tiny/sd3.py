"""Tiny SD3 and SD3.5: checkpoints, a ControlNet and adapters in the real files' layouts, with four blocks of 256."""

from __future__ import annotations

from typing import Any

import torch

from .adapter_shapes import projector_shapes
from .shapes import Shapes, conv, linear
from .strided_weights import strided_weights

BLOCKS = 4  # by which the host's loader tells the width too
WIDTH = 64 * BLOCKS
TEXT, POOLED, LATENT = 4096, 2048, 16
POSITIONS = 192**2
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609
SQUARES = (
    "to_k_ip", "to_v_ip", "add_k_proj_ip", "add_v_proj_ip", "proj_ip", "proj_encoder_hidden_states_ip",
    "proj_encoder_passthrough_ip",
)  # fmt: skip


def transformer(seed: int, normed: bool = False) -> dict[str, torch.Tensor]:
    """SD3 medium's keys, or with ``normed`` queries and keys and a second attention SD3.5 medium's."""
    weights = strided_weights(_transformer_shapes(normed), _gain, seed)
    return weights | {"pos_embed": _positions(seed)}


def controlnet(seed: int) -> dict[str, torch.Tensor]:
    """A ControlNet of two blocks, in the layout of diffusers, which SD3's are published in."""
    weights = strided_weights(_controlnet_shapes(blocks=2), _gain, seed)
    return weights | {"pos_embed.pos_embed": _positions(seed)}


def adapter(seed: int, width: int = WIDTH, normed: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """The released layout: {"image_proj": ..., "ip_adapter": ...}, its projector ``width`` wide; or, with ``normed``
    keys, SD3.5's."""
    projector = projector_shapes(width, output=TEXT)
    big = {key.replace("_out.", "_out_big.") if key.count(".") == 1 else key: projector[key] for key in projector}
    square: tuple[int, ...] = (WIDTH, WIDTH)
    plain: Shapes = {"to_k_ip": (WIDTH, TEXT), "to_v_ip": (WIDTH, TEXT), "norm_k_ip": (64,)}
    layer = plain if normed else dict.fromkeys(map(str, SQUARES), square)
    layers = {f"{n}.{name}.weight": shape for n in range(0, BLOCKS, 2) for name, shape in layer.items()}
    projector = projector if normed else big
    return {
        "image_proj": strided_weights(projector, lambda key: 2.0 if key.endswith("to_out.weight") else 1.0, seed),
        "ip_adapter": strided_weights(layers, lambda key: 1.0, seed + 1000),
    }


def _gain(key: str) -> float:
    """The prompt's tokens are many and mostly alike; what is predicted stays small beside the noise."""
    return 0.3 if key.startswith(("final_layer.linear", "controlnet_blocks")) else 1.0


def _positions(seed: int) -> torch.Tensor:
    """The table of positions as overlapping views, since whole it would be most of the file."""
    noise = torch.randn(POSITIONS + WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.3
    return torch.as_strided(noise, (1, POSITIONS, WIDTH), (1, 1, 1))


def _transformer_shapes(normed: bool) -> Shapes:
    shapes = {
        **conv("x_embedder.proj", WIDTH, LATENT, 2),
        **linear("context_embedder", WIDTH, TEXT),
        **_two("t_embedder.mlp.{}", (0, 2), 256),
        **_two("y_embedder.mlp.{}", (0, 2), POOLED),
        **linear("final_layer.linear", 4 * LATENT, WIDTH),
        **linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH),
    }
    for number in range(BLOCKS):
        last, block = number == BLOCKS - 1, f"joint_blocks.{number}"
        shapes |= _stream(f"{block}.context_block", modulations=2 if last else 6, ends=last)
        shapes |= _stream(f"{block}.x_block", modulations=9 if normed else 6)
        if normed:
            names = (f"{block}.context_block.attn", f"{block}.x_block.attn", f"{block}.x_block.attn2")
            shapes |= {f"{name}.{norm}.weight": (64,) for name in names for norm in ("ln_q", "ln_k")}
            shapes |= _attention(f"{block}.x_block.attn2")
    return shapes


def _stream(name: str, modulations: int, ends: bool = False) -> Shapes:
    shapes = linear(f"{name}.adaLN_modulation.1", modulations * WIDTH, WIDTH)
    if ends:  # after the last block nobody reads the text
        return shapes | linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
    shapes |= _attention(f"{name}.attn")
    return shapes | linear(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)


def _attention(name: str) -> Shapes:
    return linear(f"{name}.qkv", 3 * WIDTH, WIDTH) | linear(f"{name}.proj", WIDTH, WIDTH)


def _two(name: str, places: tuple[Any, Any], inner: int) -> Shapes:
    return linear(name.format(places[0]), WIDTH, inner) | linear(name.format(places[1]), WIDTH, WIDTH)


def _controlnet_shapes(blocks: int) -> Shapes:
    embedders = (("timestep_embedder", 256), ("text_embedder", POOLED))
    shapes = {
        **conv("pos_embed.proj", WIDTH, LATENT, 2),
        **conv("pos_embed_input.proj", WIDTH, LATENT, 2),
        **linear("context_embedder", WIDTH, TEXT),
    }
    for name, inner in embedders:
        shapes |= _two(f"time_text_embed.{name}.linear_{{}}", (1, 2), inner)
    for number in range(blocks):
        block = f"transformer_blocks.{number}"
        projections = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        for projection in projections:
            shapes |= linear(f"{block}.attn.{projection}", WIDTH, WIDTH)
        for stream in ("", "_context"):
            shapes |= linear(f"{block}.norm1{stream}.linear", 6 * WIDTH, WIDTH)
            shapes |= linear(f"{block}.ff{stream}.net.0.proj", 4 * WIDTH, WIDTH)
            shapes |= linear(f"{block}.ff{stream}.net.2", WIDTH, 4 * WIDTH)
        shapes |= linear(f"controlnet_blocks.{number}", WIDTH, WIDTH)
    return shapes
