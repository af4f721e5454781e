"""The same picture, words and weights through the nodes and through training."""

from __future__ import annotations

import importlib
from pathlib import Path

import inside
import torch
from bench import Bench, application, host_memory
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.tasks import Task
from training.datasets.sample import decode_picture
from training.frozen.encoders import Encoders, picture_tensor
from training.frozen.network import embedding
from training.frozen.sampling import Settings, conditionings

PROMPT = "a cat on a chair, in the evening"
nodes = {name: importlib.import_module(f"{inside.PACK}.nodes.{name}") for name in ("encode_instruction", "apply")}


def loaded_picture(path: Path) -> torch.Tensor:
    """As the host's Load Image node gives a file: [1, H, W, 3] in 0-1."""
    import nodes as host_nodes

    host_nodes.folder_paths.set_input_directory(str(path.parent))
    return host_nodes.LoadImage().load_image(path.name)[0]


class Through:
    """The same picture, words and weights through the nodes and through training."""

    def __init__(self, bench: Bench, twin: Path, encoders: Encoders, file: Path, task: Task, words: str) -> None:
        """``words`` are those that the nodes make of the task and the subject \"cup\"."""
        self.bench, self.encoders, self.task = bench, encoders, task
        hosted = host_memory.load_adapter(str(file), file.name)
        open_clip = host_memory.load_hosted_open_clip(str(twin / "clip" / "open_clip_model.safetensors"), "clip")
        paper = encoders.instruction_tower is not None
        clip = open_clip if paper else bench.clip
        self.clip_vision = open_clip
        self.picture = loaded_picture(twin / "photo.png")
        instruction = nodes["encode_instruction"].EncodeInstruction.execute(
            adapter=hosted, clip=clip, task=task.value, instruction="", subject="cup", prompt=PROMPT, negative_prompt=""
        )[0]
        self.model = nodes["apply"].ApplyAdapter.execute(
            model=bench.model, adapter=hosted, instruction=instruction, clip_vision=open_clip, image=self.picture,
            weight=1.0, start_percent=0.0, end_percent=1.0, guidance="auto", instruct_scale=2.0, image_scale=1.0,
            combine_images="concatenate",
        )[0]  # fmt: skip
        self.applied = self.model.model_options["transformer_options"][application.CHAIN].applications[0]
        self.adapter = load(file)
        self.pixels = encoders.image_tower.preprocess(picture_tensor(decode_picture((twin / "photo.png").read_bytes())))
        self.features = {
            "image": encoders.image_states(self.pixels),
            "instruction": encoders.instruction_states([words]),
            **encoders.text_features([PROMPT]),
        }
        self.settings = Settings.of_task(task, encoders.base.kind, 1, 5.0)
        rows = {**encoders.rows(), **self._own_text()}
        embed = embedding(encoders.base.network)
        self.conditions = conditionings(self.adapter, self.features, rows, self.settings, embed)

    def _own_text(self) -> dict[str, torch.Tensor]:
        """Where the host's base reads other text than training's (a tiny SD3 has one of its encoders alone), the same
        for both: it takes the place of the features', and is returned for the row without text."""
        if "pooled" not in self.features:
            return {}
        texts = {"": self.bench.text(PROMPT), "empty_": self.bench.empty}
        states = {
            f"{row}{name}": tensor
            for row, ((hidden, more),) in texts.items()
            for name, tensor in {"text": hidden, "pooled": more["pooled_output"]}.items()
        }
        self.features |= {name: states[name] for name in ("text", "pooled")}
        return {name: states[name][0] for name in ("empty_text", "empty_pooled")}
