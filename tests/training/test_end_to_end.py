"""From source datasets to a picture in ComfyUI: build, encode, train, kill, resume, export, and the real host."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers_twin import save_twin
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load, save
from ipadapter_instruct_core.config import AdapterConfig
from sources import jpeg, make_coco, make_journeydb, photograph
from tiny_base import OPEN_CLIP, save_open_clip
from tools.host.graphs import node, text_to_image
from tools.host.server import ComfyServer
from tools.tiny.models import MIN_CHECKPOINT
from tools.tiny.shapes import MIN_UNET
from training.frozen.base import load_base
from training.frozen.unet import cross_attentions

from runs import ROOT, as_toml, environment, finish

ADAPTER = "trained-here.safetensors"
OPEN_CLIP_NAME = "tiny-open-clip"
STEPS = 6


def training(verb: str, config: Path, settings: dict[str, object]) -> list[str]:
    """The command of a verb whose settings are in a file."""
    config.write_text(as_toml(settings))
    return [sys.executable, "-m", "training", verb, str(config)]


def succeed(command: list[str]) -> str:
    done = finish(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_from_datasets_to_a_picture(tmp_path: Path, tiny_models: Path) -> None:
    features = built_features(tmp_path)
    trained = trained_adapter(tmp_path, features)
    with ComfyServer(models=models_with(tmp_path, tiny_models, trained)) as server:
        picture = tmp_path / "reference.jpg"
        picture.write_bytes(jpeg(photograph("coffee")))
        name = server.upload(picture)
        bare = server.run(text_to_image(MIN_CHECKPOINT, prompt="a cup"))[0]
        told = {task: server.run(adapted(name, task, "cup"))[0] for task in ("everything", "object")}
        again = server.run(adapted(name, "object", "cup"))[0]
    for made in told.values():
        assert made.shape == (64, 64, 3) and np.isfinite(made).all() and made.std() > 0.01
        assert np.abs(made - bare).mean() > 2 / 255, "the adapter does nothing"
    assert np.abs(told["everything"] - told["object"]).mean() > 0.2 / 255, "the instruction does nothing"
    assert np.array_equal(told["object"], again)


def built_features(folder: Path) -> Path:
    """Two of the paper's sources in their true formats -> shards -> features."""
    journeydb, coco = make_journeydb(folder / "journeydb", 12), make_coco(folder / "coco")
    common = {"validation": 2, "size": 96, "samples_per_shard": 4}
    annotations = journeydb / "train_anno.jsonl"
    sources = {
        "everything": {"kind": "replication", "annotations": annotations, "images": journeydb / "imgs"},
        "object": {"kind": "object", "instances": coco / "instances.json", "captions": coco / "captions.json",
                   "images": coco / "images"},
    }  # fmt: skip
    for task, source in sources.items():
        out = folder / "data" / task
        succeed(training("build", folder / f"build-{task}.toml", {**common, "out": out, "source": source}))
    save_twin(folder / "base", MIN_UNET, seed=2)
    save_open_clip(folder / "clip")
    settings = {
        "data": [folder / "data" / task for task in sources],
        "base": folder / "base",
        "image_encoder": folder / "clip",
        "instruction_encoder": folder / "clip",
        "resolution": 64,
        "out": folder / "features",
    }
    succeed(training("encode", folder / "encode.toml", settings))
    return folder / "features"


def trained_adapter(folder: Path, features: Path) -> Path:
    """A run that is killed after its first checkpoint, resumed and exported."""
    torch.manual_seed(0)
    plus = AdapterConfig(
        image_width=OPEN_CLIP["vision_cfg"]["width"],
        width=128,
        heads=2,
        depth=2,
        instruction_width=None,
        prompt_width=None,
        layers=tuple(cross_attentions(load_base(folder / "base").network)),
    )
    start = folder / "ip-adapter-plus.safetensors"
    save(start, Adapter(plus))
    settings: dict[str, object] = {
        "base": folder / "base", "features": features, "start": start, "out": folder / "run", "steps": STEPS,
        "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "workers": 0, "log_every": 1,
        "checkpoint_every": 1, "trackers": [], "cpu": True,
        "validation": {"every": STEPS, "samples": 2, "pictures": 1, "steps": 2, "scorer": folder / "clip"},
    }  # fmt: skip
    command = training("train", folder / "train.toml", settings)
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not list((folder / "run" / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "run" / "checkpoints" / f"step-{STEPS:08d}").exists()
    assert "going on from" in succeed(command)
    assert (folder / "run" / "validation" / f"step-{STEPS:08d}" / "object.jpg").is_file()
    exported = folder / ADAPTER
    succeed([sys.executable, "-m", "training", "export", "--run", str(folder / "run"), "--out", str(exported)])
    moved = load(exported).state_dict()["image_proj.latents"] - load(start).state_dict()["image_proj.latents"]
    assert moved.abs().max() > 1e-3
    return exported


def models_with(folder: Path, tiny_models: Path, adapter: Path) -> Path:
    """The tiny models, the trained adapter, and the OpenCLIP that it was trained with."""
    models = folder / "models"
    shutil.copytree(tiny_models, models, ignore=shutil.ignore_patterns("clip_vision", "controlnet"))
    shutil.copy(adapter, models / "ipadapter_instruct" / ADAPTER)
    for ending in ("model.safetensors", "config.json"):
        target = models / "text_encoders" / f"{OPEN_CLIP_NAME}.{ending.rpartition('.')[2]}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "clip" / f"open_clip_{ending}", target)
    return models


def adapted(picture: str, task: str, subject: str) -> dict[str, object]:
    """A text-to-image graph through our loaders, Encode Instruction and Apply."""
    graph = text_to_image(MIN_CHECKPOINT, prompt="a cup")
    graph |= {
        "adapter": node("IPAdapterInstructModelLoader", adapter_name=ADAPTER),
        "open_clip": node("IPAdapterInstructOpenCLIPLoader", model_name=f"{OPEN_CLIP_NAME}.safetensors"),
        "reference": node("LoadImage", image=picture),
        "instruction": node("IPAdapterInstructEncode", adapter=["adapter", 0], clip=["open_clip", 0], task=task,
                            instruction="", subject=subject, prompt="a cup", negative_prompt=""),
        "apply": node("IPAdapterInstructApply", model=["checkpoint", 0], adapter=["adapter", 0],
                      instruction=["instruction", 0], clip_vision=["open_clip", 0], image=["reference", 0],
                      weight=1.0, start_percent=0.0, end_percent=1.0, guidance="auto", instruct_scale=2.0,
                      image_scale=1.0, combine_images="concatenate"),
    }  # fmt: skip
    graph["sampler"]["inputs"]["model"] = ["apply", 0]
    return graph
