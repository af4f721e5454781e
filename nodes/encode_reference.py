"""Encode Reference: pictures under an instruction, as a thing of its own."""

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_instruct_core.guidance import Row
from ..ipadapter_instruct_core.reference import EncodedReference
from .encode_instruction import EncodedInstruction
from .host.memory import HostedAdapter, few_at_a_time, module_dtype, remembered
from .host.vision import image_tokens
from .schema import supported
from .types import CATEGORY, Adapter, Instruction, Reference

CONCATENATE, AVERAGE, ONE_EACH = "concatenate", "average", "one for each batch item"


class EncodeReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructEncodeReference",
            display_name="Encode Reference",
            category=CATEGORY,
            description="Reads a picture as the instruction says, once: to be applied, combined with others, "
            "or saved and used again without CLIP vision.",
            search_aliases=["ip-adapter", "reference image", "image prompt", "embeds"],
            inputs=[
                Adapter.Input("adapter", tooltip="The adapter that the instruction was encoded for."),
                Instruction.Input("instruction", tooltip="What to take from the picture, from Encode Instruction."),
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION),
                io.Image.Input("image", tooltip=IMAGE),
                combine_images(),
            ],
            outputs=[Reference.Output(display_name="reference")],
        )

    @classmethod
    def execute(
        cls,
        adapter: HostedAdapter,
        instruction: EncodedInstruction,
        clip_vision: Any,
        image: Tensor,
        combine_images: str,
    ) -> io.NodeOutput:
        return io.NodeOutput(encode_reference(adapter, instruction, clip_vision, image, combine_images))


CLIP_VISION = "CLIP ViT-H/14 for the released weights (CLIP-ViT-H-14-laion2B-s32B-b79K)."
IMAGE = "The reference picture, or several as a batch. Its middle square is read."


def combine_images() -> io.Combo.Input:
    return supported(
        io.Combo.Input,
        "combine_images",
        advanced=True,
        options=[CONCATENATE, AVERAGE, ONE_EACH],
        default=CONCATENATE,
        tooltip="What to do with several pictures: use all of them, their average, or one for each latent "
        "of the batch, in turn.",
    )


def encode_reference(
    adapter: HostedAdapter, instruction: EncodedInstruction, clip_vision: Any, image: Tensor, combine: str
) -> EncodedReference:
    check_encoded_for(instruction, adapter)
    pictures, nothing = image_tokens(clip_vision, image, adapter.config)
    key = (instruction, pictures, nothing, combine)  # told apart as objects, which the memory keeps alive
    return EncodedReference(
        tokens=remembered(adapter, key, lambda: _project_rows(adapter, instruction, pictures, nothing, combine)),
        task=instruction.task,
        wording=instruction.wording,
        pictures=len(pictures),
        adapter=adapter.name,
        adapter_sha256=adapter.sha256,
    )


def check_encoded_for(instruction: EncodedInstruction, adapter: HostedAdapter) -> None:
    if instruction.config != adapter.config:
        raise ValueError(
            "The instruction was encoded for another adapter; connect the same Load IPAdapter-Instruct Model "
            "to Encode Instruction and to Apply IPAdapter-Instruct."
        )


def check_made_with(reference: EncodedReference, adapter: HostedAdapter) -> None:
    """Refuse a reference of another adapter by its name."""
    if reference.adapter_sha256 != adapter.sha256:
        raise ValueError(
            f"The reference was made with the adapter {reference.adapter}, whose weights are not those of "
            f"{adapter.name}; choose that adapter in Load IPAdapter-Instruct Model, or encode the picture anew."
        )


def _project_rows(
    adapter: HostedAdapter, instruction: EncodedInstruction, pictures: Tensor, nothing: Tensor, combine: str
) -> dict[Row, Tensor]:
    if combine == AVERAGE:
        pictures = pictures.mean(dim=0, keepdim=True)
    device = adapter.load()
    dtype = module_dtype(adapter.adapter)

    def tokens(source: Tensor, row: Row) -> Tensor:
        placed = source.to(device, dtype)
        return adapter.adapter.image_proj(placed, *instruction.texts(row, placed))

    with torch.inference_mode():
        rows = {row: few_at_a_time(partial(tokens, row=row), nothing if row is Row.UNCOND else pictures) for row in Row}
    if combine == CONCATENATE:
        rows = {row: t.flatten(0, 1).unsqueeze(0) for row, t in rows.items()}
        # Rows of a batch need one length; attention to repeated tokens is attention to them once (see `prepared`).
        rows[Row.UNCOND] = rows[Row.UNCOND].repeat(1, rows[Row.FULL].shape[1] // rows[Row.UNCOND].shape[1], 1)
    return rows
