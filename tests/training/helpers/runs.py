"""Short training runs: in this process, or in processes of their own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from training.train import checkpoints
from training.train.settings import TrainConfig
from training.train.state import OPTIMIZER, PREFIX

ROOT = Path(__file__).resolve().parents[3]


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
    from training.train.loop import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `environment` has it: another number adds up in another order
    try:
        run(TrainConfig(**settings(workshop, out, **changes)))
    finally:
        torch.set_num_threads(threads)
    return weights(out)


def weights(out: Path, name: str = "adapter.safetensors") -> dict[str, torch.Tensor]:
    return load_file(sorted((out / "checkpoints").glob("step-*"))[-1] / name)


def moments(out: Path, step: int | None = None) -> dict[str, dict[str, Tensor]]:
    """AdamW's two averages of the gradients in a checkpoint, the last by default, by the weights' names."""
    folder = out / "checkpoints"
    checkpoint = checkpoints.newest(folder) if step is None else checkpoints.path_of(folder, step)
    state = torch.load(checkpoint / OPTIMIZER, weights_only=True)["state"]
    return {
        name.removeprefix(PREFIX): {part: of_weight[part] for part in ("exp_avg", "exp_avg_sq")}
        for name, of_weight in state.items()
    }


def assert_same_moments(
    found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]], tolerance: float = 1e-3
) -> None:
    """The same gradients but for rounding, which is measured by each tensor's own largest.

    Weights cannot be compared so: where a gradient is about as small as AdamW's eps, its rounding alone decides on the
    step, and it is another one on another processor.
    """
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert_same_gradients(list(found[name].values()), list(parts.values()), tolerance, name)


def assert_same_gradients(found: list[Tensor], expected: list[Tensor], tolerance: float, name: str = "") -> None:
    for gradient, wanted in zip(found, expected, strict=True):
        largest, difference = float(wanted.abs().max()), float((gradient - wanted).abs().max())
        assert difference <= tolerance * largest, f"{name}: gradients up to {largest:.1e} differ by {difference:.1e}"


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
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def finish(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
