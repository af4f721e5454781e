"""The verbs from pictures to a file where what Windows lacks is taken away: a simulation, nothing was run there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.tasks import PHRASES
from sources import make_own_folder
from training.datasets.shards import Tally
from training.features.draws import Draws, Dropout
from training.features.stored import RawSource
from training.frozen.encoders import EncoderPaths, load_encoders, picture_tensor
from training.train.batches import Drawn

from runs import ROOT, as_toml, settings

# Processes of a loader are spawned there, and read this file again.
SCRIPT = """
import errno, fcntl, multiprocessing, os, shutil, sys, warnings

import accelerate, torch.utils.tensorboard  # what others do there is theirs, and asks for the system's name
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

sys.modules["resource"] = None
del os.setsid, os.fork
shutil._use_fd_functions = False
opened, flushed = os.open, os.fsync

def open_file(path, *arguments, **named):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return opened(path, *arguments, **named)

def fsync(handle):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flushed(handle)

os.open, os.fsync = open_file, fsync
warnings.filterwarnings("error", category=EncodingWarning, module=r"training\\b")

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from training.__main__ import main

    for verb in ("build", "encode", "train", "export"):
        sys.argv = ["training", verb, verb + ".toml"]
        main()
"""


def test_from_pictures_to_a_file(workshop: Path, tmp_path: Path) -> None:
    run = settings(workshop, tmp_path / "run", features=tmp_path / "features", steps=2, workers=1, checkpoint_every=1)
    verbs = {
        "build": {
            "out": tmp_path / "data" / "own",
            "size": 64,
            "source": {"kind": "own", "data": make_own_folder(tmp_path / "pictures"), "task": "style"},
        },
        "encode": {
            "data": [tmp_path / "data" / "own"],
            "out": tmp_path / "features",
            "base": workshop / "base",
            "image_encoder": workshop / "clip",
            "resolution": 64,
            "device": "cpu",
        },
        "train": run,
        "export": {"run": tmp_path / "run", "out": tmp_path / "adapter.safetensors"},
    }
    for verb, values in verbs.items():
        (tmp_path / f"{verb}.toml").write_text(as_toml(values))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory_gib" in (tmp_path / "run" / "metrics.jsonl").read_text()
    load(tmp_path / "adapter.safetensors")


def test_a_loaders_process_is_not_sent_the_image_tower(workshop: Path) -> None:
    paths = EncoderPaths(base=workshop / "base", image_encoder=workshop / "clip")
    encoders = load_encoders(paths)
    tower = sum(weight.nbytes for weight in encoders.image_tower.state_dict().values())
    folders = sorted((workshop / "data").iterdir())
    source = RawSource(folders, "train", Tally(0), encoders.preprocess, 64, PHRASES)
    draws = Draws(0, source.by_task, dict.fromkeys(source.by_task, 1.0), Dropout())
    sent = pickle.dumps(Drawn(source, draws))
    assert len(sent) < tower / 2
    condition, _ = source.pictures(0)
    pixels = pickle.loads(sent).source.preprocess(picture_tensor(condition))
    assert torch.equal(pixels, encoders.image_tower.preprocess(picture_tensor(condition)))
