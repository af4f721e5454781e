"""What a training step needs, on random weights: a base and its encoders, data, and the trainer that takes the step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.encoders import OpenClip
from ipadapter_instruct_core.tasks import Task
from training.datasets.shards import MANIFEST, Tally, write_shard
from training.features.encode import EncodeConfig
from training.features.encode import run as encode
from training.features.stored import FeatureSource, RawSource
from training.files import sha256, write_json
from training.frozen.base import BASE_CONFIGS, FrozenBase, clip_tokenizer
from training.frozen.encoders import Encoders
from training.train.adapter import SCRATCH
from training.train.log import RunLog
from training.train.loop import Trainer
from training.train.settings import TrainConfig

TASKS = (Task.EVERYTHING, Task.STYLE, Task.OBJECT)
WAYS = ("features", "encoders")  # a step from features, and one that runs every encoder
PHRASES = 4  # a task; all 1,200 take an hour to encode on a CPU, and a step reads one line of the table
PICTURE = 512  # side of the pictures, in pixels
# What differs from the real models' own sizes.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": (32, 32, 32, 32), "attention_head_dim": 2, "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": 64,
    },
    "vae": {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 8},
    "text": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2},
    "vision": {"layers": 12, "width": 128, "head_width": 64},
    "adapter": {"width": 64, "heads": 1, "depth": 2},
}  # fmt: skip
# On SDXL: three levels, and the states of both text encoders side by side.
SMALL_XL: dict[str, dict[str, Any]] = SMALL | {
    "unet": {
        "block_out_channels": (32, 32, 32), "attention_head_dim": 2, "layers_per_block": 1, "norm_num_groups": 8,
        "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    },
    "text": SMALL["text"] | {"projection_dim": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One measurement. ``size`` is "small" or "real"; ``precision`` as TrainConfig has it; ``folder`` for all files;
    ``samples`` in the data, by default two batches."""

    size: str
    resolution: int
    batch_size: int
    device: str
    precision: str
    workers: int
    folder: str
    base: Literal["sd15", "sdxl"] = "sd15"
    samples: int | None = None

    @property
    def kind(self) -> Base:
        return Base(self.base)

    def changes(self, part: str) -> dict[str, Any]:
        small = SMALL if self.kind is Base.SD15 else SMALL_XL
        return small[part] if self.size == "small" else {}


def base_model(settings: Settings, with_network: bool = True) -> FrozenBase:
    """A base's parts, as `training.frozen.base.load_base` returns them, made where they are used."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = BASE_CONFIGS / settings.base

    def made(kind: Any, part: str) -> Any:
        return kind.from_config({**kind.load_config(configs / part), **settings.changes(part)})

    def text_encoder(kind: Any, part: str) -> Any:
        words = json.loads((configs / part / "config.json").read_text())
        return kind(CLIPTextConfig(**{**words, **settings.changes("text")}))

    with torch.device(settings.device):
        texts = [text_encoder(CLIPTextModel, "text_encoder")]
        if settings.kind is Base.SDXL:
            texts.append(text_encoder(CLIPTextModelWithProjection, "text_encoder_2"))
        unet = made(UNet2DConditionModel, "unet") if with_network else None
        vae = made(AutoencoderKL, "vae")
    for model in (unet, vae, *texts):
        if model is not None:
            model.requires_grad_(False).eval()
    schedule = DDPMScheduler.from_config(DDPMScheduler.load_config(configs / "scheduler"))
    tokenizers = (clip_tokenizer("<|endoftext|>"),) * len(texts)
    return FrozenBase(settings.kind, unet, vae, tuple(texts), tokenizers, schedule)


def all_encoders(settings: Settings, with_network: bool = True) -> Encoders:
    """The base and ViT-H/14's image tower; its text tower, which nothing here reads, is a token one."""
    from open_clip import get_model_config

    config = get_model_config("ViT-H-14")
    config["vision_cfg"] |= settings.changes("vision")
    config["text_cfg"] |= {"width": 64, "heads": 1, "layers": 1}
    with torch.device(settings.device):
        tower = OpenClip(config).requires_grad_(False).eval()
    return Encoders(base_model(settings, with_network), tower, None)


def phrases() -> dict[Task, list[str]]:
    from training.instructions import load_bank

    return {task: some[:PHRASES] for task, some in load_bank().items()}


def write_data(settings: Settings, encoders: Encoders | None = None) -> float:
    """Raw shards of photographs, as `build` writes them, and their features from `encode`; the latter's seconds."""
    folder, count = Path(settings.folder), -(-(settings.samples or 2 * settings.batch_size) // len(TASKS))
    for task in TASKS:
        data = folder / "data" / task.value
        data.mkdir(parents=True)
        path = data / "train-00000.tar"
        written = write_shard(path, [(f"{n:09d}", _members(task, n)) for n in range(count)])
        write_json(data / MANIFEST, {"shards": [{"name": path.name, "samples": written, "sha256": sha256(path)}]})
    encoders = encoders or all_encoders(settings, with_network=False)
    config = EncodeConfig(
        data=_folders(settings), out=folder / "features", base=folder, image_encoder=folder,
        resolution=settings.resolution, batch_size=min(settings.batch_size, 16 if settings.kind is Base.SD15 else 4),
        phrases_per_subject=2,
        device=settings.device,
    )  # fmt: skip
    with (
        mock.patch("training.features.encode.load_encoders", lambda _: encoders),
        mock.patch("training.features.encode.load_bank", phrases),
    ):
        begun = time.perf_counter()
        encode(config)
    return time.perf_counter() - begun


def _folders(settings: Settings) -> list[Path]:
    return [Path(settings.folder) / "data" / task.value for task in TASKS]


def _members(task: Task, number: int) -> dict[str, bytes]:
    from PIL import Image, ImageOps
    from skimage import data
    from training.datasets.sample import Sample, encode_picture

    name = ("astronaut", "chelsea", "coffee", "rocket")[number % 4]
    photograph = ImageOps.fit(Image.fromarray(getattr(data, name)()), (PICTURE, PICTURE)).rotate(90 * (number // 4))
    target = None if task is Task.EVERYTHING else encode_picture(photograph)
    condition = encode_picture(photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    prompt = f"a photograph of {name}, the {number}th of many, in the light of the afternoon"
    subject = name if task is Task.OBJECT else ""
    return Sample(condition, target, prompt, task, str(number), str(number), subject).members()


class Way:
    """One way to take a step: the trainer's own step, on its own loader's batches."""

    def __init__(self, settings: Settings, name: str, models: Encoders | FrozenBase, **changes: Any) -> None:
        """``models`` are the encoders with a base, or for features the base alone; ``changes`` of TrainConfig."""
        from accelerate import Accelerator

        folder = Path(settings.folder)
        out = folder / "-".join([name, *changes])
        out.mkdir(exist_ok=True)
        data = {"features": folder / "features"} if name == "features" else {"data": _folders(settings)}
        config = TrainConfig(
            base=folder, out=out, **data, image_encoder=folder, resolution=settings.resolution,
            batch_size=settings.batch_size, micro_batch_size=settings.batch_size, workers=settings.workers,
            precision=settings.precision, cpu=settings.device == "cpu", trackers=[], validation={"every": 0}, **changes,
        )  # fmt: skip
        accelerator = Accelerator(mixed_precision=config.precision, cpu=config.cpu)
        with _data_in_place(settings, models, name), _small_adapter(settings):
            self.trainer = Trainer(config, accelerator)
        self.trainer.log = RunLog(accelerator, out, 0, str)
        self.batches = self.trainer._batches(0)

    def step(self) -> None:
        self.trainer._step(self.batches, told=False)

    def stretch(self, ahead: int, steps: int) -> dict[str, float]:
        """What the run's own log says of steps without a break, the first ``ahead`` left out.

        Raises:
            ValueError: a loss is not a number.
        """
        log = self.trainer.log
        for _ in range(ahead):
            self.step()
        log.check(ahead, None)  # waits for the device, too
        log.restart()
        for _ in range(steps):
            self.step()
        log.check(steps, None)
        return log.line(steps, self.trainer.config.batch_size, 0.0)


@contextmanager
def _data_in_place(settings: Settings, models: Encoders | FrozenBase, name: str) -> Iterator[None]:
    """The trainer's own loading gives these models, in place of files."""
    folder = Path(settings.folder)

    def load(config: TrainConfig, tally: Tally) -> tuple[Any, ...]:
        base = models.base if isinstance(models, Encoders) else models
        if name == "features":
            return base, None, FeatureSource(folder / "features", "train", tally), None
        made = (models.image_tower.preprocess, settings.resolution, phrases())
        return base, models, RawSource(_folders(settings), "train", tally, *made), None

    with mock.patch("training.train.loop.load_data", load):
        yield


@contextmanager
def _small_adapter(settings: Settings) -> Iterator[None]:
    small = replace(SCRATCH[settings.kind], **settings.changes("adapter"))
    with mock.patch.dict(SCRATCH, {settings.kind: small}):
        yield


def floor(way: Way, settings: Settings) -> Callable[[], None]:
    """The least that a step can be: the bare UNet forward, and backward to its input, without an adapter."""
    return partial(_bare, way.trainer, settings)


def _bare(trainer: Trainer, settings: Settings) -> None:
    from training.frozen.unet import predict

    device, rows, side = trainer.accelerator.device, settings.batch_size, settings.resolution // 8
    width = trainer.base.network.config.cross_attention_dim
    latents = torch.zeros(rows, 4, side, side, device=device, dtype=trainer.dtype, requires_grad=True)
    text = torch.ones(rows, 77, width, device=device, dtype=trainer.dtype)
    timesteps = torch.full((rows,), 500, device=device)
    predict(trainer.base.network, latents, timesteps, text, None).float().pow(2).mean().backward()
