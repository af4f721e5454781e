"""The frozen models of the miniature and adapters for it, on one device: cases -> pictures, many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import InstructionEncoder
from ipadapter_instruct_core.guidance import Row
from ipadapter_instruct_core.tasks import Task
from torch import Tensor
from training.files import sha256
from training.frozen.base import fingerprint
from training.frozen.encoders import EncoderPaths, Encoders, load_encoders
from training.frozen.fit import check_fit
from training.frozen.sampling import Conditioning, Settings, conditionings, initial_noise, sample
from training.frozen.unet import prepare_unet
from training.instructions.choose import Wording, drawn
from training.miniature.judged.cases import Case
from training.miniature.models import oracle
from training.miniature.world.drawn import to_tensor
from training.miniature.world.samples import TASKS

TASK_PLACE = "{task}"  # in an adapter's path: the name of each task


@dataclass(frozen=True)
class Loaded:
    """An adapter on its device, and the hash of its file."""

    adapter: Adapter
    sha256: str


@dataclass(frozen=True)
class Models:
    """Attributes:
    encoders, dropped: by what reads instructions, the encoders and the features of dropped conditions.
    adapters: by row and task.
    """

    encoders: dict[InstructionEncoder, Encoders]
    dropped: dict[InstructionEncoder, dict[str, Tensor]]
    adapters: dict[tuple[str, Task], Loaded]
    oracle: oracle.Oracle
    device: torch.device

    @property
    def any_encoders(self) -> Encoders:
        """All of them read pictures and prompts alike."""
        return next(iter(self.encoders.values()))

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    def identities(self) -> dict[str, str]:
        """A hash of each frozen model."""
        base = self.any_encoders.base
        own = {"unet": fingerprint(base.network), "oracle": fingerprint(self.oracle)}
        return {**own, **self.encoders[InstructionEncoder.OPEN_CLIP].identities()}


@torch.inference_mode()
def load_models(rows: Mapping[str, str], folder: Path, device: torch.device) -> Models:
    """Load all in single precision.

    Args:
        rows: names and paths of adapter files, see `files_of`.
        folder: what `expand` has written.

    Raises:
        FileNotFoundError: the oracle has no weights, or a row no file.
        ValueError: a model is missing, or an adapter is for other models.
    """
    clip = folder / "open_clip" / "miniature-clip.safetensors"
    paths = EncoderPaths(base=folder / "diffusers", image_encoder=clip, instruction_encoder=str(clip))
    both = load_encoders(paths, with_network=True)
    layers = prepare_unet(both.base.network)
    both.to(device)
    both.base.network.to(device, memory_format=torch.channels_last)
    encoders = {
        InstructionEncoder.OPEN_CLIP: both,
        InstructionEncoder.CLIP_L: Encoders(both.base, both.image_tower, None),
    }
    adapters, opened = {}, {}
    for row, path in rows.items():
        for task, file in files_of(row, path).items():
            if file not in opened:
                adapter = load(file).float()
                widths = encoders[adapter.config.instruction_encoder].widths()
                check_fit(file.name, adapter.config, widths, layers, both.base.kind)
                opened[file] = Loaded(adapter.to(device).requires_grad_(False).eval(), sha256(file))
            adapters[row, task] = opened[file]
    dropped = {kind: one.rows() for kind, one in encoders.items()}
    return Models(encoders, dropped, adapters, oracle.load().to(device), device)


def files_of(row: str, path: str) -> dict[Task, Path]:
    """The file of each task: one for all, or where the path holds "{task}", those that exist.

    Raises:
        FileNotFoundError: there is none.
    """
    files = {task: Path(path.replace(TASK_PLACE, task.value)) for task in TASKS}
    found = {task: file for task, file in files.items() if file.is_file()}
    if not found:
        raise FileNotFoundError(f'There is no adapter {path} for the row "{row}"; train and export it first.')
    return found


@dataclass(frozen=True)
class Prepared:
    """What pictures of cases need, whatever the adapter: image [N, T, W], text [N, L, W], noise [N, 4, 8, 8]."""

    cases: Sequence[Case]
    image: Tensor
    text: Tensor
    noise: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, models: Models, cases: Sequence[Case], batch: int) -> Prepared:
        encoders = models.any_encoders
        pictures = to_tensor(np.stack([case.picture for case in cases]))
        image = [encoders.image_states(encoders.image_tower.preprocess(part)) for part in pictures.split(batch)]
        prompts = [case.prompt for case in cases]
        starts = range(0, len(prompts), batch)
        text = [encoders.text_features(prompts[start : start + batch])["text"] for start in starts]
        noise = initial_noise([case.seed for case in cases], (4, 8, 8)).to(models.device)
        return cls(cases, torch.cat(image), torch.cat(text), noise)


@torch.inference_mode()
def paint(
    models: Models,
    prepared: Prepared,
    loaded: Loaded | None,
    wording: Wording | Literal[""],
    settings: Settings,
    batch: int,
) -> Tensor:
    """[N, 3, 64, 64] in 0-1: a picture of every case; without an adapter those of the bare base.

    Args:
        wording: of the instructions, see `choose.wordings`; any for an adapter that follows none.
    """
    made, coefficients, base = [], settings.coefficients(), models.any_encoders.base
    for start in range(0, len(prepared.cases), batch):
        part = slice(start, start + batch)
        text = prepared.text[part]
        if loaded is None:
            empty = next(iter(models.dropped.values()))["empty_text"].expand_as(text)
            conditions = {Row.FULL: Conditioning(text, None), Row.UNCOND: Conditioning(empty, None)}
        else:
            kind = loaded.adapter.config.instruction_encoder
            words = [drawn(wording or "fixed", case.task, case.subject, case.seed) for case in prepared.cases[part]]
            states = models.encoders[kind].instruction_states(words)
            features = {"image": prepared.image[part], "text": text, "instruction": states}
            conditions = conditionings(loaded.adapter, features, models.dropped[kind], settings)
        latents = sample(base, conditions, coefficients, prepared.noise[part], settings.steps)
        made.append(base.decode(latents))
    return torch.cat(made)
