"""Combine References."""

from typing import Any

from comfy_api.latest import io

from ..ipadapter_instruct_core.reference import EncodedReference, combine
from .schema import supported
from .types import CATEGORY, Reference

SIDE_BY_SIDE, MEAN = "side by side", "mean"
MOST = 4


class CombineReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructCombineReferences",
            display_name="Combine References",
            category=CATEGORY,
            description="Makes one reference of several, at one strength: the style of one with the face of another, "
            "or half this style, half that one.",
            search_aliases=["ip-adapter", "combine embeds", "style transfer"],
            inputs=[
                *_slots(1, optional=False),
                *_slots(2, optional=False),
                io.Combo.Input(
                    "method",
                    options=[SIDE_BY_SIDE, MEAN],
                    default=SIDE_BY_SIDE,
                    tooltip="side by side: the picture looks at all of them, each with its share. mean: one reference "
                    "between them, as a mixture of two styles.",
                ),
                *(slot for number in range(3, MOST + 1) for slot in _slots(number, optional=True)),
            ],
            outputs=[Reference.Output(display_name="reference")],
        )

    @classmethod
    def execute(cls, method: str, **inputs: Any) -> io.NodeOutput:
        numbers = [number for number in range(1, MOST + 1) if inputs.get(f"reference_{number}") is not None]
        references: list[EncodedReference] = [inputs[f"reference_{number}"] for number in numbers]
        weights = [inputs.get(f"weight_{number}", 1.0) for number in numbers]
        return io.NodeOutput(combine(references, weights, mean=method == MEAN))


def _slots(number: int, optional: bool) -> list[io.Input]:
    first = " The first decides on the task's strength and guidance." if number == 1 else ""
    return [
        Reference.Input(
            f"reference_{number}", optional=optional, tooltip=f"A reference of the same adapter as the others.{first}"
        ),
        io.Float.Input(
            f"weight_{number}",
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=optional,
            tooltip="Its share beside the others: only the proportions count.",
        ),
    ]
