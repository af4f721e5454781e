"""The kinds of links between our nodes. Names are part of saved workflows and never change."""

import math

from comfy_api.latest import io

CATEGORY = "IPAdapter-Instruct"

Adapter = io.Custom("IPADAPTER_INSTRUCT")
Instruction = io.Custom("IPADAPTER_INSTRUCTION")
Reference = io.Custom("IPADAPTER_INSTRUCT_REFERENCE")
# Given for either, since our inputs have the host's types: packs that fill inputs from afar compare types with ==.
# The first name is what older saved workflows have.
OpenClip = io.Custom("IPADAPTER_INSTRUCT_OPEN_CLIP,CLIP,CLIP_VISION")


def guidance_scales(when: str = "") -> list[io.Float.Input]:
    """The scales of three-way guidance beside the text's, which is the sampler's cfg; ``when`` ends the tooltips."""
    end = f"; {when}." if when else "."
    scales = {
        "instruct_scale": (
            2.0,
            f"How strongly the instruction is followed (2 on SD1.5, 4 to 6 on SDXL, 6 on SD3){end}",
        ),
        "image_scale": (
            1.0,
            f"How strongly the picture is followed in any case (1 on SD1.5 and SD3, 0.5 on SDXL){end}",
        ),
    }
    return [
        io.Float.Input(name, default=default, min=0.0, max=30.0, step=0.1, tooltip=tooltip)
        for name, (default, tooltip) in scales.items()
    ]


def check_settings(**settings: float) -> None:
    """Refuse a setting, by its input's name, that is NaN or infinite: it would blacken the picture without a word."""
    for name, value in settings.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value:g}, which is no number; type a number, or check the node it comes from."
            )
