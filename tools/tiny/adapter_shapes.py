"""Key and shape table of a released-layout adapter for SD1.5, with instructions or without, as {key: shape}."""

from __future__ import annotations

from .shapes import CHANNELS, TEXT, Shapes, UNetLayout

IMAGE = 1280  # width of ViT-H/14's penultimate states
TOKENS = 16
DEPTH = 4
HEAD = 64


def projector_shapes(
    width: int, prompt_layers: bool = True, image: int = IMAGE, instruction: int | None = TEXT, output: int = TEXT
) -> Shapes:
    """The projector.

    Args:
        prompt_layers: False gives the paper's, which does not read the prompt.
        image, instruction: widths of what it reads; None gives IPAdapter+, which reads no instruction.
        output: width of a token, which is that of the UNet's text.
    """
    read = {"proj_in": image, "proj_new_input": instruction, "proj_prompt_input": TEXT if prompt_layers else None}
    sources = {name: inner for name, inner in read.items() if inner}
    shapes: Shapes = {"latents": (1, TOKENS, width)}
    for name, inner in sources.items():
        shapes |= {f"{name}.weight": (width, inner), f"{name}.bias": (width,)}
    shapes |= {"proj_out.weight": (output, width), "proj_out.bias": (output,)}
    shapes |= {"norm_out.weight": (output,), "norm_out.bias": (output,)}
    stacks = {"layers": 4, **({"new_input_layers": 2} if instruction else {})}
    stacks |= {"prompt_layers": 2} if prompt_layers else {}
    for stack, multiple in stacks.items():
        for index in range(DEPTH):
            shapes |= _layer_shapes(f"{stack}.{index}", width, multiple * width)
    return shapes


def _layer_shapes(name: str, width: int, hidden: int) -> Shapes:
    return {
        f"{name}.0.norm1.weight": (width,),
        f"{name}.0.norm1.bias": (width,),
        f"{name}.0.norm2.weight": (width,),
        f"{name}.0.norm2.bias": (width,),
        f"{name}.0.to_q.weight": (width, width),
        f"{name}.0.to_kv.weight": (2 * width, width),
        f"{name}.0.to_out.weight": (width, width),
        f"{name}.1.0.weight": (width,),
        f"{name}.1.0.bias": (width,),
        f"{name}.1.1.weight": (hidden, width),
        f"{name}.1.3.weight": (width, hidden),
    }


def key_value_shapes(layout: UNetLayout) -> Shapes:
    """Key and value projections of every cross-attention, numbered by odd attention processors."""
    return {
        f"{2 * index + 1}.to_{kind}_ip.weight": (CHANNELS, TEXT)
        for index in range(layout.cross_attentions)
        for kind in ("k", "v")
    }
