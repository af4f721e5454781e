"""IPAdapter-Instruct Guider, for SamplerCustomAdvanced."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .host.application import ThreeWay
from .host.apply import with_guider_scales
from .schema import supported
from .types import CATEGORY, check_settings, guidance_scales


class Guider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructGuider",
            display_name="IPAdapter-Instruct Guider",
            category=CATEGORY,
            description="Three-way guidance for SamplerCustomAdvanced: a scale each for text, instruction and image, "
            "whatever is set in Apply IPAdapter-Instruct.",
            search_aliases=["ip-adapter", "three-way guidance"],
            inputs=[
                io.Model.Input("model", tooltip="A model that has passed through Apply IPAdapter-Instruct."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The text scale: how strongly the prompt is followed (5 on SD1.5, 7 on SDXL, 6 on SD3).",
                ),
                *guidance_scales(),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: list, negative: list, cfg: float, instruct_scale: float, image_scale: float
    ) -> io.NodeOutput:
        check_settings(cfg=cfg, instruct_scale=instruct_scale, image_scale=image_scale)
        guider = comfy.samplers.CFGGuider(with_guider_scales(model, ThreeWay(instruct_scale, image_scale)))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)
