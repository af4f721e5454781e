"""Prepare Reference: which square of a picture CLIP sees, and on which ground."""

import random
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn.functional import interpolate

from ..ipadapter_instruct_core.framing import BY_LOT, CENTER, PAD, PLACES, box_around, colour_of, framed
from .host.vision import checked_mask, checked_pictures
from .schema import supported
from .types import CATEGORY, check_settings

ZOOM, CUT_OUT, BOTH = "zoom", "cut out", "cut out and zoom"


class PrepareReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructPrepareReference",
            display_name="Prepare Reference",
            category=CATEGORY,
            description="Chooses what CLIP sees of a picture, which else is its middle square: another place, all of "
            "it on a coloured square, or what a mask shows. The node shows that very square.",
            search_aliases=["ip-adapter", "reference image", "prep image", "crop", "clip vision"],
            inputs=[
                io.Image.Input("image", tooltip="One picture, or several as a batch."),
                io.Combo.Input(
                    "crop_position",
                    options=list(PLACES),
                    default=CENTER,
                    tooltip="Where the square lies in the picture. pad: the whole picture, padded to a square.",
                ),
                io.String.Input(
                    "colour",
                    default=BY_LOT,
                    tooltip="What pads, and what lies behind a cut-out: a name (teal), a value (#7fb0c8), or random. "
                    "Objects are taken best from a coloured ground.",
                ),
                supported(
                    io.Int.Input,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Decides on the random colour.",
                ),
                io.Combo.Input(
                    "use_mask",
                    options=[ZOOM, CUT_OUT, BOTH],
                    default=ZOOM,
                    tooltip="What a mask is for: zoom to what it shows (a face), cut that out onto the colour "
                    "(an object), or both.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.5,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much is seen around the mask, as a share of its longer side.",
                ),
                supported(
                    io.Int.Input,
                    "size",
                    default=224,
                    min=32,
                    max=1024,
                    advanced=True,
                    tooltip="The side of the square in pixels: 224 is what CLIP ViT-H/14 reads.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The part of the picture to keep, white; stretched to its size."
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        squares = prepare(**inputs)
        return io.NodeOutput(squares, ui=ui.PreviewImage(squares, cls=cls))


def prepare(
    image: Tensor,
    crop_position: str,
    colour: str,
    seed: int,
    use_mask: str,
    margin: float,
    size: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The squares [B, size, size, 3] of pictures [B, H, W, C] in 0-1; a random colour is drawn for each."""
    check_settings(margin=margin)
    pictures, masks, lot = checked_pictures(image).movedim(-1, 1), checked_mask(mask), random.Random(seed)
    squares = [
        _square(
            picture.float(),
            None if masks is None else masks[place % len(masks)],
            torch.tensor(colour_of(colour, lot), device=picture.device) / 255,
            (crop_position, use_mask, margin, size),
        )
        for place, picture in enumerate(pictures)
    ]
    return torch.stack(squares).movedim(1, -1)


def _square(picture: Tensor, mask: Tensor | None, colour: Tensor, settings: tuple[str, str, float, int]) -> Tensor:
    """One picture [C, H, W] with one, three or four channels -> [3, size, size]."""
    crop_position, use_mask, margin, size = settings
    ground = colour.view(3, 1, 1)
    if len(picture) == 4:
        picture = picture[:3] * picture[3:] + ground * (1 - picture[3:])
    picture = picture.expand(3, -1, -1)
    box = (0, 0, *picture.shape[1:])
    if mask is not None:
        mask = interpolate(mask[None, None], size=picture.shape[1:], mode="bilinear", antialias=True)[0, 0].to(
            picture.device
        )
        around = box_around(mask, margin, whole=crop_position == PAD)  # also refuses a black mask
        box = box if use_mask == CUT_OUT else around
        picture = picture if use_mask == ZOOM else picture * mask + ground * (1 - mask)
    return framed(picture, box, crop_position, colour, size)
