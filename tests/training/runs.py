"""Short training runs: in this process, or in processes of their own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def settings(workshop: Path, out: Path, **changes: object) -> dict[str, object]:
    return {
        "base": workshop / "base",
        "features": workshop / "features",
        "start": workshop / "start.safetensors",
        "out": out,
        "steps": 8,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "workers": 0,
        "log_every": 2,
        "checkpoint_every": 4,
        "validation": {"every": 0},
        "trackers": [],
        "cpu": True,
        **changes,
    }


def train(workshop: Path, out: Path, **changes: object) -> dict[str, torch.Tensor]:
    """A run in this process; returns the weights of its last checkpoint."""
    from training.train import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `environment` has it: another number adds up in another order
    try:
        run(TrainConfig(**settings(workshop, out, **changes)))
    finally:
        torch.set_num_threads(threads)
    return weights(out)


def weights(out: Path, name: str = "adapter.safetensors") -> dict[str, torch.Tensor]:
    return load_file(sorted((out / "checkpoints").glob("step-*"))[-1] / name)


def command(workshop: Path, out: Path, *launcher: str, **changes: object) -> list[str]:
    """The same run as a command; ``launcher`` is what stands before ``-m training`` in place of Python itself."""
    path = out.with_suffix(".toml")
    path.write_text(as_toml(settings(workshop, out, **changes)))
    return [sys.executable, *launcher, "-m", "training", "train", str(path)]


def as_toml(values: dict[str, object], prefix: str = "") -> str:
    def text(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return "[" + ", ".join(text(item) for item in value) + "]"
        return repr(value) if isinstance(value, (int, float)) else f'"{value}"'

    lines = [f"{key} = {text(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = [(key, value) for key, value in values.items() if isinstance(value, dict)]
    return (
        "\n".join(lines + [f"\n[{prefix}{key}]\n{as_toml(value, f'{prefix}{key}.')}" for key, value in tables]) + "\n"
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def finish(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
