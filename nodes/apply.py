"""Apply IPAdapter-Instruct: a picture and an instruction onto a MODEL, for any sampler."""

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_instruct_core.curves import Curve
from ..ipadapter_instruct_core.reference import EncodedReference, rows_of
from ..ipadapter_instruct_core.tasks import GuidanceMode, TaskDefaults, defaults
from .encode_instruction import EncodedInstruction
from .encode_reference import CLIP_VISION, CONCATENATE, IMAGE, check_made_with, combine_images, encode_reference
from .host import apply as host_apply
from .host import log
from .host.application import Application, ThreeWay
from .host.memory import HostedAdapter
from .host.vision import checked_mask
from .schema import supported
from .types import CATEGORY, Adapter, Instruction, Reference, check_settings, guidance_scales

AUTO = "auto"


class ApplyAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructApply",
            display_name="Apply IPAdapter-Instruct",
            category=CATEGORY,
            description="Conditions the model on a picture, as the instruction says. Nodes can be chained: "
            "two pictures, two instructions.",
            search_aliases=["ip-adapter", "style transfer", "reference image", "image prompt"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SD1.5, SDXL, SD3 or SD3.5 model, of the same family as the adapter."
                ),
                Adapter.Input("adapter", tooltip="The adapter that the instruction was encoded for."),
                Instruction.Input(
                    "instruction",
                    optional=True,
                    tooltip="What to take from the picture, from Encode Instruction.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=CLIP_VISION),
                io.Image.Input("image", optional=True, tooltip=IMAGE),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="1.0 is the task's own strength: 0.8 of full on SD1.5 and SD3, 0.9 on SDXL, on "
                    "SD1.5 and SDXL 0.2 less for composition and pose. 0 switches the adapter and its guidance off.",
                ),
                *(
                    supported(
                        io.Float.Input, name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tip, advanced=True
                    )
                    for name, default, tip in (
                        ("start_percent", 0.0, "When the adapter sets in."),
                        ("end_percent", 1.0, "When the adapter stops."),
                    )
                ),
                io.Combo.Input(
                    "guidance",
                    options=[AUTO, GuidanceMode.SIMPLE.value, GuidanceMode.THREE_WAY.value],
                    default=AUTO,
                    tooltip="auto: the task decides on guidance and scales. simple: the sampler's cfg guides all. "
                    "three-way: text (cfg), instruction and image have a scale each; up to twice the time.",
                ),
                *guidance_scales("read only when guidance is set to three-way"),
                combine_images(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the new picture the adapter acts (white). A detailer samples a crop, over which "
                    "the whole mask is stretched: leave it out there.",
                ),
                Reference.Input(
                    "reference",
                    optional=True,
                    tooltip="In place of instruction, clip_vision and image: from Encode, Load or Combine References.",
                ),
                Reference.Input(
                    "negative_reference",
                    optional=True,
                    tooltip="What to keep away from, as its own instruction says (not this style): "
                    "it stands in the negative prompt's place beside no picture.",
                ),
                supported(
                    io.Combo.Input,
                    "weight_curve",
                    options=[curve.value for curve in Curve],
                    default=Curve.CONSTANT.value,
                    optional=True,
                    advanced=True,
                    tooltip="How the weight changes from start_percent to end_percent: the same throughout, rising "
                    "(ease in), falling (ease out), rising and falling (ease in-out), or falling and rising.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: HostedAdapter,
        instruction: EncodedInstruction | None = None,
        clip_vision: Any = None,
        image: Tensor | None = None,
        weight: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        guidance: str = AUTO,
        instruct_scale: float = 2.0,
        image_scale: float = 1.0,
        combine_images: str = CONCATENATE,
        mask: Tensor | None = None,
        reference: EncodedReference | None = None,
        negative_reference: EncodedReference | None = None,
        weight_curve: str = Curve.CONSTANT.value,
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
        host_apply.matching_sites(model, adapter)  # before the picture is encoded: the cheap checks first
        for each in (reference, negative_reference):
            if each is not None:
                check_made_with(each, adapter)
        encoded = {"instruction": instruction, "clip_vision": clip_vision, "image": image}
        _check_either(reference, encoded)
        if weight == 0.0:
            return io.NodeOutput(host_apply.without(model))
        if reference is None:
            reference = encode_reference(adapter, **encoded, combine=combine_images)
        task = defaults(reference.task, adapter.config.base)
        tokens, bias = rows_of(reference, negative_reference)
        application = Application(
            adapter=adapter,
            tokens=tokens,
            weight=weight * task.weight,
            start_percent=start_percent,
            end_percent=end_percent,
            three_way=_three_way(adapter, task, guidance, instruct_scale, image_scale),
            mask=checked_mask(mask),
            bias=bias,
            curve=Curve(weight_curve),
        )
        return io.NodeOutput(host_apply.apply(model, application))


def _check_either(reference: EncodedReference | None, encoded: dict[str, Any]) -> None:
    """Refuse a reference beside what one is encoded from, or neither. CLIP vision alone contradicts nothing: packs that
    connect by themselves give it to all that take one."""
    given = [name for name, value in encoded.items() if value is not None]
    if reference is not None and {*given} - {"clip_vision"}:
        raise ValueError(
            f"Both a reference and {', '.join(given)} are connected; take the one or the other away: a reference "
            "already holds the picture and its instruction."
        )
    if reference is None and not {"instruction", "image"} <= {*given}:
        lost = " and ".join(name for name in encoded if name not in given)
        raise ValueError(
            f"There is no picture to apply: {lost} not connected; connect instruction, clip_vision and image, or a "
            "reference from Encode Reference."
        )


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
