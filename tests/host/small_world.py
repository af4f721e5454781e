"""The miniature's models in the real host, inside the test's process: its loaders, our nodes, its sampler.

Pictures of many cases are sampled together where one Apply node serves them all: one picture each ("one for each batch
item"), one instruction. Their prompts lie in one batch of conditioning, which the host deals out to the latents.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inside
import numpy as np
import torch
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.tasks import defaults
from torch import Tensor
from training.miniature.judged.cases import Case, Rate, score
from training.miniature.models import oracle

inside.start()

import folder_paths  # noqa: E402

import nodes as host_nodes  # noqa: E402

CFG = 5.0


def node(module: str, name: str) -> Any:
    """One of our nodes, as a function of its inputs that returns its first output."""
    found = getattr(importlib.import_module(f"{inside.PACK}.nodes.{module}"), name)
    return lambda *args, **inputs: found.execute(*args, **inputs)[0]


load_model, load_open_clip = node("load_model", "LoadModel"), node("load_open_clip", "LoadOpenClip")
encode_instruction, apply_adapter = node("encode_instruction", "EncodeInstruction"), node("apply", "ApplyAdapter")


class SmallWorld:
    """Everything loaded by name from a models folder, as a workflow would.

    Attributes:
        adapter, instruction, strength, guidance: what pictures are made with until `renew`. An instruction of "" is the
            task's own; the strength has the task's default multiplied in, and the miniature's adapter is made for 1.0.
    """

    def __init__(self, models: Path, steps: int) -> None:
        self.steps = steps
        for folder in models.iterdir():
            folder_paths.add_model_folder_path(folder.name, str(folder))
        self.model, self.clip, self.vae = host_nodes.CheckpointLoaderSimple().load_checkpoint("miniature.safetensors")
        self.open_clip = load_open_clip("miniature-clip.safetensors")
        self.controlnet = host_nodes.ControlNetLoader().load_controlnet("miniature-scribble.safetensors")[0]
        self.oracle = oracle.load()
        self.renew()

    def renew(self) -> None:
        """The adapter as its file has it, under the tasks' own instructions, guided as in docs/miniature/oracle.md."""
        self.adapter, self.instruction = load_model("miniature.safetensors"), ""
        self.strength, self.guidance = 1.0, "simple"

    def with_lora(self) -> Any:
        return host_nodes.LoraLoader().load_lora(self.model, self.clip, "miniature-woodcut.safetensors", 1.0, 0.0)[0]

    def applied(self, cases: Sequence[Case], model: Any) -> Any:
        """The model under the cases' pictures and the instruction that they have in common."""
        task, subject = cases[0].task, cases[0].subject
        instruction = encode_instruction(
            self.adapter, self.open_clip, task.value, self.instruction, subject, prompt="", negative_prompt=""
        )
        return apply_adapter(
            model,
            self.adapter,
            instruction,
            self.open_clip,
            images([case.picture for case in cases]),
            weight=self.strength / defaults(task, Base.SD15).weight,
            start_percent=0.0,
            end_percent=1.0,
            guidance=self.guidance,
            instruct_scale=2.0,
            image_scale=1.0,
            combine_images="one for each batch item",
        )

    def paint(
        self, cases: Sequence[Case], model: Any = None, adapted: bool = True, hints: Sequence[np.ndarray] = ()
    ) -> Tensor:
        """[N, 3, 64, 64] in 0-1: a picture of each case.

        Args:
            model: the checkpoint's own, or one with a LoRA.
            adapted: False for what the model makes of the prompts alone.
            hints: a scribble [64, 64, 3] uint8 for each case.
        """
        model, made = model or self.model, torch.empty(len(cases), 3, 64, 64)
        for subject in {case.subject for case in cases}:
            places = [place for place, case in enumerate(cases) if case.subject == subject]
            some = [cases[place] for place in places]
            positive, negative = self.text([case.prompt for case in some]), self.text([""])
            if hints:
                hint = images([hints[place] for place in places])
                apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
                positive, negative = apply(positive, negative, self.controlnet, hint, 1.0, 0.0, 1.0)
            latent = {"samples": torch.zeros(len(some), 4, 8, 8)}
            patched = self.applied(some, model) if adapted else model
            sampled = host_nodes.KSampler().sample(
                patched, places[0], self.steps, CFG, "dpmpp_2m", "normal", positive, negative, latent
            )[0]
            made[places] = host_nodes.VAEDecode().decode(self.vae, sampled)[0].movedim(-1, 1)
        return made

    def text(self, prompts: Sequence[str]) -> list:
        """The prompts' conditionings as one, a row each."""
        each = [host_nodes.CLIPTextEncode().encode(self.clip, prompt)[0] for prompt in prompts]
        return [[torch.cat([text[0][0] for text in each]), each[0][0][1]]]

    def rates(self, cases: Sequence[Case], **how: Any) -> dict[str, Rate]:
        return score(cases, self.paint(cases, **how), self.oracle)


def images(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] uint8 as the host's IMAGE [B, H, W, 3] in 0-1."""
    return torch.from_numpy(np.stack(pictures)).float() / 255
