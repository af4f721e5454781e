"""Encode Instruction: what to take from the picture, in words."""

import re
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_instruct_core.config import AdapterConfig, Base
from ..ipadapter_instruct_core.guidance import Row
from ..ipadapter_instruct_core.tasks import EVERYTHING_ROW, UNTRAINED, Task, phrase
from .host import log
from .host.memory import HostedAdapter
from .host.text import encode_text
from .types import CATEGORY, Adapter, Instruction


@dataclass(frozen=True, eq=False)
class EncodedInstruction:
    """For each row of guidance, the instruction and prompt tokens that the projector reads, [1, L, W] or None."""

    task: Task
    wording: str
    config: AdapterConfig
    rows: dict[Row, tuple[Tensor | None, Tensor | None]]


class EncodeInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IPAdapterInstructEncode",
            display_name="Encode Instruction",
            category=CATEGORY,
            description="Says in words what to take from the picture: choose a task, or write your own wording.",
            inputs=[
                Adapter.Input("adapter", tooltip="Decides which text tower reads the instruction."),
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of your checkpoint, or an OpenCLIP model if the adapter wants one.",
                ),
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
                io.String.Input(
                    "subject",
                    display_name="subject (object task)",
                    default="",
                    placeholder="for the object task: what it is",
                    tooltip="For the object task: what it is, in place of the word 'object', without an article "
                    "(red teapot).",
                ),
                io.String.Input(
                    "prompt",
                    display_name="positive prompt, again",
                    default="",
                    multiline=True,
                    placeholder="the positive prompt, again",
                    dynamic_prompts=True,
                    tooltip="The released weights also read the prompt: repeat your positive prompt here. "
                    "Weights without prompt layers ignore it.",
                ),
                io.String.Input(
                    "negative_prompt",
                    display_name="negative prompt, again",
                    default="",
                    multiline=True,
                    placeholder="the negative prompt, again",
                    dynamic_prompts=True,
                    tooltip="Repeat your negative prompt here; the SDXL weights do not use it.",
                ),
            ],
            outputs=[Instruction.Output(display_name="instruction")],
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
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError("No CLIP is connected (the checkpoint holds none); load one with Load CLIP.")
        chosen, config = Task(task), adapter.config
        wording = _wording(chosen, instruction, subject)
        if chosen in UNTRAINED.get(config.base, ()):
            log.warning(
                "The released %s weights were not trained on the task %r; the result may be weak.",
                config.base.label,
                task,
            )
        if config.base is Base.SDXL:
            negative_prompt = ""  # the SDXL weights were trained with an empty one
        return io.NodeOutput(
            EncodedInstruction(chosen, wording, config, _encode_rows(clip, config, wording, prompt, negative_prompt))
        )


def _wording(task: Task, instruction: str, subject: str) -> str:
    """The user's own wording, or the task's; a subject takes the place of the word "object" in either (Sec. 3.4)."""
    instruction, subject = instruction.strip(), subject.strip()
    if not instruction:
        return phrase(task, subject)
    return re.sub(r"\bobject\b", lambda _: subject, instruction) if subject else instruction


def _encode_rows(
    clip: Any, config: AdapterConfig, wording: str, prompt: str, negative: str
) -> dict[Row, tuple[Tensor | None, Tensor | None]]:
    if not config.follows_instructions:
        return dict.fromkeys(Row, (None, None))

    def instruction(text: str) -> Tensor:
        return encode_text(clip, text, config, literal=True)

    # "image" uses the negative prompt's embedding for an instruction too, as the reference code does.
    negative_tokens = encode_text(clip, negative, config, literal=False)
    prompt_tokens = encode_text(clip, prompt, config, literal=False) if config.reads_prompt else None
    negative_prompt_tokens = negative_tokens if config.reads_prompt else None
    return {
        Row.FULL: (instruction(wording), prompt_tokens),
        Row.EVERYTHING: (instruction(EVERYTHING_ROW), prompt_tokens),
        Row.IMAGE: (negative_tokens, negative_prompt_tokens),
        Row.UNCOND: (instruction(""), negative_prompt_tokens),
    }
