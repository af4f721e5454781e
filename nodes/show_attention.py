"""Show Where It Looked: the patches of the reference that the adapter's tokens attended to."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn.functional import interpolate

from ..ipadapter_instruct_core.attention_map import attention_shares
from ..ipadapter_instruct_core.encoders import preprocess
from ..ipadapter_instruct_core.guidance import Row
from .encode_instruction import EncodedInstruction
from .encode_reference import CLIP_VISION, IMAGE, check_encoded_for
from .host.memory import HostedAdapter, intermediate, module_dtype
from .host.vision import checked_pictures, image_tokens
from .schema import supported
from .sheet import Cell, sheet_of
from .types import CATEGORY, Adapter, Instruction

ATTENTION, DIFFERENCE = "attention", "difference to everything"
SIZE = 224  # of a picture in the sheet
# Black, red, yellow, white; and for differences blue, black, red.
HEAT = ((0.0, 0.0, 0.0), (0.8, 0.1, 0.1), (1.0, 0.85, 0.2), (1.0, 1.0, 1.0))
LESS_OR_MORE = ((0.2, 0.5, 1.0), (0.0, 0.0, 0.0), (1.0, 0.35, 0.1))


class ShowAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructShowAttention",
            display_name="Show Where It Looked",
            category=CATEGORY,
            description="Paints over the reference where the adapter's tokens attended under each instruction, on one "
            "scale. It tells what was read, not what came of it.",
            search_aliases=["attention map", "heatmap", "saliency", "ip-adapter"],
            is_input_list=True,
            inputs=[
                Adapter.Input("adapter", tooltip="The adapter that the instructions were encoded for."),
                Instruction.Input("instruction", tooltip="One from Encode Instruction, or the list of All Tasks."),
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION),
                io.Image.Input("image", tooltip=IMAGE),
                io.Combo.Input(
                    "show",
                    options=[ATTENTION, DIFFERENCE],
                    default=ATTENTION,
                    tooltip="The attention itself, or how it differs from that under the word everything: red is more, "
                    "blue is less.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(
        cls,
        adapter: list[HostedAdapter],
        instruction: list[EncodedInstruction],
        clip_vision: list[Any],
        image: list[Tensor],
        show: list[str],
    ) -> io.NodeOutput:
        difference = show[0] == DIFFERENCE
        for each in instruction:
            check_encoded_for(each, adapter[0])
        pictures = [checked_pictures(each) for each in image]
        tokens = torch.cat([image_tokens(clip_vision[0], each, adapter[0].config)[0] for each in pictures])
        maps = torch.stack([looked_at(adapter[0], each, tokens, difference) for each in instruction], dim=1)
        scale = maps.abs().max().clamp(min=1e-12)  # one for all, or they could not be compared
        squares = torch.cat([preprocess(each.movedim(-1, 1).float(), SIZE, (0, 0, 0), (1, 1, 1)) for each in pictures])
        cells = []
        for square, row in zip(squares.movedim(1, -1).cpu(), maps.cpu() / scale.cpu(), strict=True):
            cells.append(Cell(square, "reference"))
            cells += [
                Cell(_painted(square, each, difference), one.wording)
                for each, one in zip(row, instruction, strict=True)
            ]
        return io.NodeOutput(sheet_of(cells, columns=1 + len(instruction)))


def looked_at(adapter: HostedAdapter, instruction: EncodedInstruction, tokens: Tensor, difference: bool) -> Tensor:
    """[B, S, S], the attention to each patch of pictures' tokens [B, N, W]; or what it has more than for everything."""
    placed = tokens.to(adapter.load(), module_dtype(adapter.adapter))

    def shares(row: Row) -> Tensor:
        return intermediate(attention_shares(adapter.adapter.image_proj, placed, *instruction.texts(row, placed)))

    with torch.inference_mode():
        return shares(Row.FULL) - shares(Row.EVERYTHING) if difference else shares(Row.FULL)


def _painted(square: Tensor, attention: Tensor, difference: bool) -> Tensor:
    """A picture [S, S, 3] in grey under the colours of what was attended to, [s, s] in 0-1 or from -1 to 1."""
    values = interpolate(attention[None, None], size=square.shape[:2], mode="bilinear")[0, 0]
    stops = torch.tensor(LESS_OR_MORE if difference else HEAT)
    place = ((values + 1) / 2 if difference else values).clamp(0, 1) * (len(stops) - 1)
    below = place.floor().clamp(max=len(stops) - 2).long()
    colour = torch.lerp(stops[below], stops[below + 1], (place - below).unsqueeze(-1))
    grey = square.mean(dim=-1, keepdim=True).expand(-1, -1, 3) * 0.5
    return grey + colour * 0.6
