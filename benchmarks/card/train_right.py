"""Training is right: half precisions beside float32 on the same draws, a run that was killed, two ranks on one card."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report import Result
from ..training_models import Settings, Way, base_model, write_data
from .part import Part, from_command_line

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
RATE = 1e-4  # of these short runs
LEAST_ALIKE = 0.1  # 1 - cosine of what a run in half precision changed, to what float32 changed
MOST_LOSS = 0.02  # by how much a step's loss may differ, as a share of it
STEPS_OF_RUN, EVERY = 40, 10  # of the runs that are killed, and between their checkpoints
MOST_OF_RANKS = 0.1  # of the weights' largest change: rounding that AdamW makes whole steps of


def precisions(part: Part, folder: Path) -> None:
    """The same 50 steps of batches of 8 in each precision."""
    settings = Settings("small", 64, 8, part.device, "no", 0, str(folder), samples=24)
    write_data(settings)
    base = base_model(settings)
    steps = 10 if part.small else STEPS
    exact = steps_in(settings, base, steps)
    for name in ("bf16", "fp16"):
        if name == "fp16" and not part.on_card:
            continue  # accelerate's loss scaler wants a card
        losses, update = steps_in(replace(settings, precision=name), base, steps)
        away = float(((losses - exact[0]).abs() / exact[0]).max())
        alike = float(torch.nn.functional.cosine_similarity(update, exact[1], dim=0))
        part.lines.add(
            Result(f"{steps} steps in {name}: a step's loss beside fp32's, largest share", away, "", MOST_LOSS),
            Result(f"{steps} steps in {name}: 1 - cosine of the weights' change", 1 - alike, "", LEAST_ALIKE),
        )


def steps_in(settings: Settings, base: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Losses [steps], and what the steps changed of all weights, as one vector."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # so that another precision can be chosen
    way = Way(settings, "features", base, learning_rate=RATE, max_grad_norm=0.0)
    before = flat(way)
    for _ in range(steps):
        way.step()
    losses = torch.stack([micro.mean() for micro in way.trainer.log.losses]).float().cpu()
    assert losses.isfinite().all() and losses.numel() == steps
    return losses, flat(way) - before


def flat(way: Way) -> Tensor:
    return torch.cat([weight.detach().float().flatten().cpu() for weight in way.trainer.model.parameters()])


def runs(part: Part, folder: Path) -> None:
    """Whole runs by the command itself: one, the same again, one that is killed and goes on, and one of two ranks."""
    from tools.tiny.diffusers_models import save_ip_adapter_plus, save_open_clip, save_sd15
    from training.features.encode import EncodeConfig
    from training.features.encode import run as encode
    from training.miniature.world import samples

    save_sd15(folder / "base")
    save_ip_adapter_plus(folder / "start.safetensors", folder / "base")
    samples.run(samples.BuildConfig(folder / "data", count=180, validation=20))
    models = {"image_encoder": save_open_clip(folder / "clip"), "instruction_encoder": str(folder / "clip")}
    chosen = {"resolution": 64, "phrases_per_subject": 8, "device": "cpu"}
    encode(EncodeConfig(data=[folder / "data"], out=folder / "features", base=folder / "base", **models, **chosen))
    (folder / "run.toml").write_text('base = "base"\nfeatures = "features"\nstart = "start.safetensors"\nout = "one"\n')
    names = ("one", "killed") if part.small else ("one", "again", "killed")  # on a processor all runs agree
    started = {name: run(part, folder, name) for name in names}
    kill_after_a_checkpoint(started["killed"], folder / "killed" / "checkpoints")
    started["killed"] = run(part, folder, "killed")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone")
    two = run(part, folder, "two", launcher, stderr=subprocess.PIPE)
    for name, process in started.items():
        assert process.wait() == 0, f"the run {name} failed; its message is above"
    one = weights(folder / "one")
    moved = apart(weights(folder / "one", EVERY), one)
    again, killed = (apart(weights(folder / name), one) / moved for name in (names[-2], "killed"))
    part.lines.add(
        Result("a run given twice: weights apart, as a share of their change", again, ""),
        Result("a run killed and resumed: the same", killed, "", 2 * again),
    )
    errors = two.communicate()[1]
    if two.returncode == 0:
        name = "two ranks beside one: weights apart, as a share of their change"
        part.lines.add(Result(name, apart(weights(folder / "two"), one) / moved, "", MOST_OF_RANKS))
    else:
        why = [line.strip() for line in errors.splitlines() if "Error" in line or "Duplicate" in line] or ["no message"]
        part.lines.add(note=f"two ranks on one card: refused ({why[0][:160]})")


def run(part: Part, folder: Path, name: str, launcher: tuple[str, ...] = (), **process: Any) -> subprocess.Popen[str]:
    """Start `train` on the small world; two ranks share the card."""
    place = "--cpu" if not part.on_card else "--no-cpu"
    steps = ("--steps", STEPS_OF_RUN, "--checkpoint-every", EVERY, "--keep", STEPS_OF_RUN, "--log-every", EVERY)
    batches = ("--batch-size", 16, "--micro-batch-size", 8, "--learning-rate", 1e-3, "--ema", 0.9, "--workers", 0)
    options = ("run.toml", "--out", name, *steps, *batches, place, "--validation.every", 0, "--trackers")
    arguments = [sys.executable, *launcher, "-m", "training", "train", *options]
    known = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": known, "OMP_NUM_THREADS": "1"}
    if launcher and part.on_card:
        environment["ACCELERATE_TORCH_DEVICE"] = "cuda:0"
    return subprocess.Popen([str(each) for each in arguments], cwd=folder, env=environment, text=True, **process)


def kill_after_a_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 300
    while not (folder / f"step-{EVERY:08d}").exists():
        assert process.poll() is None and time.monotonic() < end, "the run made no checkpoint"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / f"step-{STEPS_OF_RUN:08d}").exists(), "the run ended before it was killed"


def weights(run: Path, step: int = STEPS_OF_RUN) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors")


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def main() -> None:
    part = from_command_line(__doc__)
    for check in (precisions, runs):
        with tempfile.TemporaryDirectory() as folder:
            check(part, Path(folder))


if __name__ == "__main__":
    main()
