"""All Tasks: a list of instructions, for which the nodes after it run one by one."""

from typing import Any

from comfy_api.latest import io

from ..ipadapter_instruct_core.tasks import Task, phrase
from .encode_instruction import encode_instructions, prompts, readers
from .host.memory import HostedAdapter
from .host.text import encode_prompts
from .schema import supported
from .types import CATEGORY, Instruction

OF_THE_PAPER = tuple(Task)[:5]
FIRST = tuple(Task)[:9]  # those of later tasks stand behind all else: saved graphs know widgets by their places
MOST = 64


def _ticks(tasks: tuple[Task, ...]) -> list[io.Boolean.Input]:
    return [
        io.Boolean.Input(task.value, default=task in OF_THE_PAPER, tooltip=f"Whether to take the task: {phrase(task)}.")
        for task in tasks
    ]


class AllTasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return supported(
            io.Schema,
            node_id="IPAdapterInstructAllTasks",
            display_name="All Tasks",
            category=CATEGORY,
            description="Gives a list of instructions: the nodes after it run once for each. Label Sheet puts the "
            "results together.",
            search_aliases=["ip-adapter", "compare", "instructions", "style transfer"],
            inputs=[
                *readers(),
                *_ticks(FIRST),
                io.String.Input(
                    "wordings",
                    display_name="own wordings, one a line",
                    default="",
                    multiline=True,
                    placeholder="own wordings, one a line\nstyle: borrow the brush strokes",
                    tooltip="Own wordings, one a line, each after the task that decides on weight and guidance "
                    "(style: borrow the brush strokes); without one it is everything.",
                ),
                *prompts(),
                *_ticks(tuple(Task)[len(FIRST) :]),
            ],
            outputs=[
                Instruction.Output(display_name="instruction", is_output_list=True),
                io.String.Output(display_name="label", is_output_list=True),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        adapter: HostedAdapter,
        clip: Any,
        wordings: str,
        subject: str,
        prompt: str,
        negative_prompt: str,
        prompt_clip: Any = None,
        **ticks: bool,
    ) -> io.NodeOutput:
        chosen = [(task, phrase(task, subject.strip())) for task in Task if ticks.get(task.value)]
        chosen += [_own_wording(line) for line in wordings.splitlines() if line.strip()]
        if not chosen:
            raise ValueError("No task is ticked and no wording is written; tick one, or write a wording of your own.")
        if len(chosen) > MOST:
            raise ValueError(f"There are {len(chosen)} instructions, and {MOST} at most are taken at a time.")
        return io.NodeOutput(
            encode_instructions(adapter, clip, chosen, prompt, negative_prompt),
            [f"{task.value}: {wording}" for task, wording in chosen],
            *encode_prompts(clip, prompt_clip, prompt, negative_prompt),
        )


def _own_wording(line: str) -> tuple[Task, str]:
    """A line's task and wording: what stands before a colon, where that is a task's name."""
    before, colon, after = line.partition(":")
    name = before.strip().lower()
    if colon and after.strip() and name in {task.value for task in Task}:
        return Task(name), after.strip()
    return Task.EVERYTHING, line.strip()
