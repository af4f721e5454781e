"""Key and shape tables of the models that ComfyUI's SD1.5 loaders accept, as {key: shape}.

Written from the layouts themselves, so that making tiny models needs no ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]

CHANNELS = 320  # what the host's SD1.5 detection asks of the first level
TIME = 4 * CHANNELS
TEXT = 768


@dataclass(frozen=True)
class UNetLayout:
    """Which blocks a UNet has; every level has 320 channels, since only the first level's width is checked.

    Attributes:
        levels: for each level, whether its blocks hold a transformer.
        blocks: residual blocks a level.
        middle: whether there is a middle block.
    """

    levels: tuple[bool, ...]
    blocks: int
    middle: bool

    @property
    def cross_attentions(self) -> int:
        """Cross-attention layers, which is how many key and value pairs an adapter for it has."""
        return sum(self.levels) * (2 * self.blocks + 1) + self.middle


MIN_UNET = UNetLayout(levels=(True,), blocks=1, middle=False)
FULL_UNET = UNetLayout(levels=(True, True, True, False), blocks=2, middle=True)


def linear(name: str, out: int, inner: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if bias else {})}


def conv(name: str, out: int, inner: int, size: int = 3, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inner, size, size), **({f"{name}.bias": (out,)} if bias else {})}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _residual_block(name: str, inner: int) -> Shapes:
    return {
        **_norm(f"{name}.in_layers.0", inner),
        **conv(f"{name}.in_layers.2", CHANNELS, inner),
        **linear(f"{name}.emb_layers.1", CHANNELS, TIME),
        **_norm(f"{name}.out_layers.0", CHANNELS),
        **conv(f"{name}.out_layers.3", CHANNELS, CHANNELS),
        **(conv(f"{name}.skip_connection", CHANNELS, inner, 1) if inner != CHANNELS else {}),
    }


def _attention(name: str, context: int) -> Shapes:
    return {
        **linear(f"{name}.to_q", CHANNELS, CHANNELS, bias=False),
        **linear(f"{name}.to_k", CHANNELS, context, bias=False),
        **linear(f"{name}.to_v", CHANNELS, context, bias=False),
        **linear(f"{name}.to_out.0", CHANNELS, CHANNELS),
    }


def _transformer(name: str) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    return {
        **_norm(f"{name}.norm", CHANNELS),
        **conv(f"{name}.proj_in", CHANNELS, CHANNELS, 1),
        **_attention(f"{block}.attn1", CHANNELS),
        **_attention(f"{block}.attn2", TEXT),
        **linear(f"{block}.ff.net.0.proj", 8 * CHANNELS, CHANNELS),
        **linear(f"{block}.ff.net.2", CHANNELS, 4 * CHANNELS),
        **_norm(f"{block}.norm1", CHANNELS),
        **_norm(f"{block}.norm2", CHANNELS),
        **_norm(f"{block}.norm3", CHANNELS),
        **conv(f"{name}.proj_out", CHANNELS, CHANNELS, 1),
    }


def _encoder_half(layout: UNetLayout) -> Shapes:
    """Time embedding, input blocks and middle block: what a UNet and a ControlNet have in common."""
    shapes = {**linear("time_embed.0", TIME, CHANNELS), **linear("time_embed.2", TIME, TIME)}
    shapes |= conv("input_blocks.0.0", CHANNELS, 4)
    index = 1
    for level, has_transformer in enumerate(layout.levels):
        for _ in range(layout.blocks):
            shapes |= _residual_block(f"input_blocks.{index}.0", CHANNELS)
            shapes |= _transformer(f"input_blocks.{index}.1") if has_transformer else {}
            index += 1
        if level < len(layout.levels) - 1:
            shapes |= conv(f"input_blocks.{index}.0.op", CHANNELS, CHANNELS)
            index += 1
    if layout.middle:
        shapes |= _residual_block("middle_block.0", CHANNELS)
        shapes |= _transformer("middle_block.1")
        shapes |= _residual_block("middle_block.2", CHANNELS)
    return shapes


def unet_shapes(layout: UNetLayout) -> Shapes:
    shapes = _encoder_half(layout)
    index = 0
    for level in reversed(range(len(layout.levels))):
        for block in range(layout.blocks + 1):
            shapes |= _residual_block(f"output_blocks.{index}.0", 2 * CHANNELS)
            shapes |= _transformer(f"output_blocks.{index}.1") if layout.levels[level] else {}
            if level > 0 and block == layout.blocks:
                shapes |= conv(f"output_blocks.{index}.{1 + layout.levels[level]}.conv", CHANNELS, CHANNELS)
            index += 1
    return {**shapes, **_norm("out.0", CHANNELS), **conv("out.2", 4, CHANNELS)}


def controlnet_shapes(layout: UNetLayout) -> Shapes:
    shapes = _encoder_half(layout)
    blocks = len(layout.levels) * (layout.blocks + 1)
    for index in range(blocks):
        shapes |= conv(f"zero_convs.{index}.0", CHANNELS, CHANNELS, 1)
    widths = (3, 16, 16, 32, 32, 96, 96, 256, CHANNELS)
    for index, (inner, out) in enumerate(pairwise(widths)):
        shapes |= conv(f"input_hint_block.{2 * index}", out, inner)
    return {**shapes, **conv("middle_block_out.0", CHANNELS, CHANNELS, 1)}


def _clip_layer(name: str, width: int) -> Shapes:
    shapes = {**_norm(f"{name}.layer_norm1", width), **_norm(f"{name}.layer_norm2", width)}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= linear(f"{name}.self_attn.{projection}", width, width)
    return {**shapes, **linear(f"{name}.mlp.fc1", 4 * width, width), **linear(f"{name}.mlp.fc2", width, 4 * width)}


def clip_text_shapes() -> Shapes:
    """CLIP-L's text tower: 12 layers of 768."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, TEXT),
        "text_model.embeddings.position_embedding.weight": (77, TEXT),
    }
    for index in range(12):
        shapes |= _clip_layer(f"text_model.encoder.layers.{index}", TEXT)
    return {**shapes, **_norm("text_model.final_layer_norm", TEXT)}


def clip_vision_shapes(width: int = 1280, layers: int = 32, projection: int = 1024) -> Shapes:
    """CLIP's image tower with 14-pixel patches of a 224-pixel picture; by default ViT-H/14."""
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
        **_norm("vision_model.pre_layrnorm", width),
    }
    for index in range(layers):
        shapes |= _clip_layer(f"vision_model.encoder.layers.{index}", width)
    shapes |= _norm("vision_model.post_layernorm", width)
    return {**shapes, **linear("visual_projection", projection, width, bias=False)}


def open_clip_shapes(width: int, layers: int, size: int, patch: int) -> Shapes:
    """OpenCLIP's own layout of both towers, each so many ``layers`` of ``width``, without its one scalar."""
    patches = (size // patch) ** 2
    shapes: Shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (patches + 1, width),
        "visual.proj": (width, width),
        **conv("visual.conv1", width, 3, patch, bias=False),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= _norm(norm, width)
    for tower in ("visual.transformer", "transformer"):
        for index in range(layers):
            name = f"{tower}.resblocks.{index}"
            shapes |= {**_norm(f"{name}.ln_1", width), **_norm(f"{name}.ln_2", width)}
            shapes |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{name}.attn.out_proj", width, width)
            shapes |= {
                **linear(f"{name}.mlp.c_fc", 4 * width, width),
                **linear(f"{name}.mlp.c_proj", width, 4 * width),
            }
    return shapes


def taesd_shapes(latent: int = 4) -> Shapes:
    """A TAESD autoencoder, without its two scalars: convolutions of 64 channels, three halvings, so many channels of
    latents."""
    # Positions of the residual blocks and of the strided or upsampled convolutions in the two nn.Sequential.
    encoder = {"blocks": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), "resampling": (2, 6, 10)}
    decoder = {"blocks": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), "resampling": (7, 12, 17)}
    shapes: Shapes = {}
    for name, places in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        for block in places["blocks"]:
            for layer in (0, 2, 4):
                shapes |= conv(f"{name}.{block}.conv.{layer}", 64, 64)
        for place in places["resampling"]:
            shapes |= conv(f"{name}.{place}", 64, 64, bias=False)
    shapes |= {**conv("taesd_encoder.0", 64, 3), **conv("taesd_encoder.14", latent, 64)}
    return {**shapes, **conv("taesd_decoder.1", 64, latent), **conv("taesd_decoder.19", 3, 64)}
