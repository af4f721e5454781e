"""Encode Instruction: what to take from the picture, in words."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_instruct_core.config import AdapterConfig, Base
from ..ipadapter_instruct_core.guidance import Row
from ..ipadapter_instruct_core.tasks import EVERYTHING_ROW, UNTRAINED, Task, phrase
from .host import log
from .host.memory import HostedAdapter
from .host.text import encode_prompts, encode_text
from .schema import supported
from .types import CATEGORY, Adapter, Instruction


@dataclass(frozen=True, eq=False)
class EncodedInstruction:
    """For each row of guidance, the instruction and prompt tokens that the projector reads, [1, L, W] or None."""

    task: Task
    wording: str
    config: AdapterConfig
    rows: dict[Row, tuple[Tensor | None, Tensor | None]]

    def texts(self, row: Row, pictures: Tensor) -> list[Tensor | None]:
        """A row's tokens for each of some pictures [B, N, W], where and in the precision that those are."""
        return [None if text is None else text.to(pictures).expand(len(pictures), -1, -1) for text in self.rows[row]]


class EncodeInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructEncode",
            display_name="Encode Instruction",
            category=CATEGORY,
            description="Says in words what to take from the picture: choose a task, or write your own wording.",
            search_aliases=["ip-adapter", "style transfer", "image prompt", "prompt"],
            inputs=[
                *readers(),
                io.Combo.Input(
                    "task",
                    options=[task.value for task in Task],
                    default=Task.EVERYTHING.value,
                    tooltip="What to take from the picture. It also decides on the default weight and guidance.",
                ),
                io.String.Input(
                    "instruction",
                    display_name="own wording (optional)",
                    default="",
                    multiline=True,
                    placeholder="own wording (optional)",
                    tooltip="Your own wording in place of the task's; the task still decides on weight and guidance. "
                    "Brackets and braces are taken literally.",
                ),
                *prompts(),
            ],
            outputs=[
                Instruction.Output(display_name="instruction"),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        adapter: HostedAdapter,
        clip: Any,
        task: str,
        instruction: str,
        subject: str,
        prompt: str,
        negative_prompt: str,
        prompt_clip: Any = None,
    ) -> io.NodeOutput:
        chosen = Task(task)
        wordings = [(chosen, wording_of(chosen, instruction, subject))]
        return io.NodeOutput(
            *encode_instructions(adapter, clip, wordings, prompt, negative_prompt),
            *encode_prompts(clip, prompt_clip, prompt, negative_prompt),
        )


def readers() -> list[io.Input]:
    """What reads an instruction."""
    return [
        Adapter.Input("adapter", tooltip="Decides which text tower reads the instruction."),
        io.Clip.Input("clip", tooltip="The CLIP of your checkpoint, or an OpenCLIP model if the adapter wants one."),
    ]


def prompts() -> list[io.Input]:
    """What an instruction is encoded with beside its wording."""
    return [
        io.String.Input(
            "subject",
            display_name="subject (object task)",
            default="",
            placeholder="for the object task: what it is",
            tooltip="For the object task: what it is, in place of the word 'object', without an article (red teapot).",
        ),
        io.String.Input(
            "prompt",
            display_name="positive prompt",
            default="",
            multiline=True,
            placeholder="the positive prompt",
            dynamic_prompts=True,
            tooltip="The positive prompt. It becomes the output 'positive'; the released weights read it too.",
        ),
        io.String.Input(
            "negative_prompt",
            display_name="negative prompt",
            default="",
            multiline=True,
            placeholder="the negative prompt",
            dynamic_prompts=True,
            tooltip="The negative prompt. It becomes the output 'negative'; the released SD1.5 and SD3 weights read it "
            "too.",
        ),
        io.Clip.Input(
            "prompt_clip",
            optional=True,
            tooltip="Only where clip is an OpenCLIP model: the CLIP of your checkpoint, for 'positive' and 'negative'.",
        ),
    ]


def encode_instructions(
    adapter: HostedAdapter, clip: Any, wordings: list[tuple[Task, str]], prompt: str, negative_prompt: str
) -> list[EncodedInstruction]:
    """An instruction of each wording; what they have in common is encoded once."""
    if clip is None:
        raise ValueError("No CLIP is connected (the checkpoint holds none); load one with Load CLIP.")
    config = adapter.config
    for task, _ in wordings:
        if task in UNTRAINED.get(config.base, ()):
            log.warning(
                "The released %s weights were not trained on the task %r; unless yours were, the result may be weak.",
                config.base.label,
                task.value,
            )
    if config.base is Base.SDXL:
        negative_prompt = ""  # the SDXL weights were trained with an empty one
    encode = cache(partial(encode_text, clip, config=config))
    return [
        EncodedInstruction(task, wording, config, _encode_rows(encode, config, wording, prompt, negative_prompt))
        for task, wording in wordings
    ]


def wording_of(task: Task, instruction: str, subject: str) -> str:
    """The user's own wording, or the task's; a subject takes the place of the word "object" in either (Sec. 3.4)."""
    instruction, subject = instruction.strip(), subject.strip()
    if not instruction:
        return phrase(task, subject)
    return re.sub(r"\bobject\b", lambda _: subject, instruction) if subject else instruction


def _encode_rows(
    encode: Callable[..., Tensor], config: AdapterConfig, wording: str, prompt: str, negative: str
) -> dict[Row, tuple[Tensor | None, Tensor | None]]:
    if not config.follows_instructions:
        return dict.fromkeys(Row, (None, None))

    # "image" uses the negative prompt's embedding for an instruction too, as the reference code does.
    negative_tokens = encode(negative, literal=False)
    prompt_tokens = encode(prompt, literal=False) if config.reads_prompt else None
    negative_prompt_tokens = negative_tokens if config.reads_prompt else None
    return {
        Row.FULL: (encode(wording, literal=True), prompt_tokens),
        Row.EVERYTHING: (encode(EVERYTHING_ROW, literal=True), prompt_tokens),
        Row.IMAGE: (negative_tokens, negative_prompt_tokens),
        Row.UNCOND: (encode("", literal=True), negative_prompt_tokens),
    }
