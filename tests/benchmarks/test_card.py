"""The card's benchmark on this processor, whole: what it prints of correctness holds here, too."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.card.__main__ import PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("card") / "card.json"
    command = [sys.executable, "-m", "benchmarks.card", "--cpu", "--small", "--seconds", "1500", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def values(content: dict) -> dict[str, float]:
    return {result["name"]: result["value"] for result in content["results"]}


def test_every_part_is_whole(content: dict, values: dict[str, float]) -> None:
    assert set(content["seconds"]) == set(PARTS)
    assert all(math.isfinite(value) for value in values.values())
    assert [result["name"] for result in content["results"] if result["ok"] is False] == []


def test_what_makes_the_pack_right_was_looked_at(content: dict) -> None:
    bounded = [result["name"] for result in content["results"] if result["ok"]]
    for start in (
        "vectors: projector-sd15, bf16", "vectors: unet-sd15 through the slots, bf16", "guidance: three-way",
        "memory: picture after", "memory: picture where no memory", "waits: ours beyond it, three-way",
        "10 steps in bf16", "a run killed and resumed", "two ranks beside one",
    ):  # fmt: skip
        assert any(name.startswith(start) for name in bounded), start


def test_a_patched_model_compiles_to_as_many_graphs_as_the_bare_one(values: dict[str, float]) -> None:
    bare, ours = (value for name, value in values.items() if name.endswith(": graphs"))
    assert ours == bare == 1


def test_figures_follow_from_one_another(values: dict[str, float]) -> None:
    over = values["SD1.5 512: the fastest step ÷ its arithmetic at the matrix rate"]
    shares = [value for name, value in values.items() if name.startswith("SD1.5 512: micro") and "share" in name]
    assert len(shares) == 2 and over == pytest.approx(1 / max(shares))
    assert values["Apply: again, nothing changed"] < values["Apply: another picture"]


def test_a_part_that_takes_too_long_is_cut_off_and_what_it_found_stays(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    command = [sys.executable, "-m", "benchmarks.card", "right", "fast", "--cpu", "--small", "--seconds", "3"]
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "right, cut off, for time; fast, not begun, for time" in done.stderr
    assert json.loads(path.read_text())["notes"] == ["right: cut off, for time", "fast: not begun, for time"]


def test_without_a_card_it_says_how_to_try_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.card", "--json", str(tmp_path / "card.json")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode != 0 and "add --cpu --small" in done.stderr
