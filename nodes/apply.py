"""Apply IPAdapter-Instruct: a picture and an instruction onto a MODEL, for any sampler."""

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_instruct_core.guidance import Row
from ..ipadapter_instruct_core.tasks import GuidanceMode, TaskDefaults, defaults
from .encode_instruction import EncodedInstruction
from .host import apply as host_apply
from .host import log
from .host.application import Application, ThreeWay
from .host.memory import HostedAdapter, few_at_a_time, module_dtype, remembered
from .host.vision import image_tokens
from .types import CATEGORY, Adapter, Instruction, check_settings, guidance_scales

AUTO = "auto"
CONCATENATE, AVERAGE, ONE_EACH = "concatenate", "average", "one for each batch item"


class ApplyAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPAdapterInstructApply",
            display_name="Apply IPAdapter-Instruct",
            category=CATEGORY,
            description="Conditions the model on a picture, as the instruction says. Nodes can be chained: "
            "two pictures, two instructions.",
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SDXL or SD3 model, of the same family as the adapter."),
                Adapter.Input("adapter", tooltip="The adapter that the instruction was encoded for."),
                Instruction.Input("instruction", tooltip="What to take from the picture, from Encode Instruction."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="CLIP ViT-H/14 for the released weights (CLIP-ViT-H-14-laion2B-s32B-b79K).",
                ),
                io.Image.Input(
                    "image", tooltip="The reference picture, or several as a batch. Its middle square is read."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="1.0 is the task's own strength: 0.8 of full on SD1.5 and SD3, 0.9 on SDXL, on "
                    "SD1.5 and SDXL 0.2 less for composition and pose. 0 switches the adapter and its guidance off.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="When the adapter sets in."
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="When the adapter stops."
                ),
                io.Combo.Input(
                    "guidance",
                    options=[AUTO, GuidanceMode.SIMPLE.value, GuidanceMode.THREE_WAY.value],
                    default=AUTO,
                    tooltip="auto: the task decides on guidance and scales. simple: the sampler's cfg guides all. "
                    "three-way: text (cfg), instruction and image have a scale each; up to twice the time.",
                ),
                *guidance_scales("read only when guidance is set to three-way"),
                io.Combo.Input(
                    "combine_images",
                    options=[CONCATENATE, AVERAGE, ONE_EACH],
                    default=CONCATENATE,
                    tooltip="What to do with several pictures: use all of them, their average, or one for each latent "
                    "of the batch, in turn.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the new picture the adapter acts (white). A detailer samples a crop, over which "
                    "the whole mask is stretched: leave it out there.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: HostedAdapter,
        instruction: EncodedInstruction,
        clip_vision: Any,
        image: Tensor,
        weight: float,
        start_percent: float,
        end_percent: float,
        guidance: str,
        instruct_scale: float,
        image_scale: float,
        combine_images: str,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        check_settings(
            weight=weight,
            start_percent=start_percent,
            end_percent=end_percent,
            instruct_scale=instruct_scale,
            image_scale=image_scale,
        )
        if start_percent >= end_percent:
            raise ValueError(
                f"start_percent ({start_percent:g}) is not before end_percent ({end_percent:g}), so the adapter "
                "would never act; lower the start, raise the end, or set the weight to 0."
            )
        if instruction.config != adapter.config:
            raise ValueError(
                "The instruction was encoded for another adapter; connect the same Load IPAdapter-Instruct Model "
                "to Encode Instruction and to Apply IPAdapter-Instruct."
            )
        host_apply.matching_sites(model, adapter)  # before the picture is encoded: the cheap check first
        if weight == 0.0:
            return io.NodeOutput(host_apply.without(model))
        task = defaults(instruction.task, adapter.config.base)
        application = Application(
            adapter=adapter,
            tokens=_project(adapter, instruction, clip_vision, image, combine_images),
            weight=weight * task.weight,
            start_percent=start_percent,
            end_percent=end_percent,
            three_way=_three_way(adapter, task, guidance, instruct_scale, image_scale),
            mask=_checked_mask(mask),
        )
        return io.NodeOutput(host_apply.apply(model, application))


def _three_way(
    adapter: HostedAdapter, task: TaskDefaults, guidance: str, instruct_scale: float, image_scale: float
) -> ThreeWay | None:
    if not adapter.config.follows_instructions:
        log.info("%s has no instruction layers: the instruction is ignored and guidance is simple.", adapter.name)
        return None
    if guidance == AUTO:
        three_way = task.guidance is GuidanceMode.THREE_WAY
        return ThreeWay(task.instruct_scale, task.image_scale, automatic=True) if three_way else None
    return ThreeWay(instruct_scale, image_scale) if guidance == GuidanceMode.THREE_WAY.value else None


def _checked_mask(mask: Tensor | None) -> Tensor | None:
    """[M, H, W] in 0-1, of any size and shape: it is stretched over the picture."""
    if mask is None:
        return None
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    if mask.numel() == 0:
        raise ValueError("The mask is empty; connect a mask with at least one pixel, or none.")
    return mask.nan_to_num().clamp(0, 1)


def _project(
    adapter: HostedAdapter, instruction: EncodedInstruction, clip_vision: Any, image: Tensor, combine: str
) -> dict[Row, Tensor]:
    """Adapter tokens [N, T, O] of every row."""
    pictures, nothing = image_tokens(clip_vision, image, adapter.config)
    key = (instruction, pictures, nothing, combine)  # told apart as objects, which the memory keeps alive
    return remembered(adapter, key, lambda: _project_rows(adapter, instruction, pictures, nothing, combine))


def _project_rows(
    adapter: HostedAdapter, instruction: EncodedInstruction, pictures: Tensor, nothing: Tensor, combine: str
) -> dict[Row, Tensor]:
    if combine == AVERAGE:
        pictures = pictures.mean(dim=0, keepdim=True)
    device = adapter.load()
    dtype = module_dtype(adapter.adapter)

    def tokens(source: Tensor, row: Row) -> Tensor:
        texts = (text if text is None else text.to(device, dtype) for text in instruction.rows[row])
        texts = (text if text is None else text.expand(len(source), -1, -1) for text in texts)
        return adapter.adapter.image_proj(source.to(device, dtype), *texts)

    with torch.inference_mode():
        rows = {row: few_at_a_time(partial(tokens, row=row), nothing if row is Row.UNCOND else pictures) for row in Row}
    if combine == CONCATENATE:
        rows = {row: t.flatten(0, 1).unsqueeze(0) for row, t in rows.items()}
        # Rows of a batch need one length; attention to repeated tokens is attention to them once (see `prepared`).
        rows[Row.UNCOND] = rows[Row.UNCOND].repeat(1, rows[Row.FULL].shape[1] // rows[Row.UNCOND].shape[1], 1)
    return rows
