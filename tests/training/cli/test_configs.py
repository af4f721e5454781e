"""The configs are what they say: they parse, hold the paper's values, and the debug ones run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from safetensors.torch import load_file
from training import __main__ as command_line
from training import debug
from training.cli.verbs import VERBS, read_config
from training.train import checkpoints

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "training" / "configs").rglob("*.toml"))
MINIATURE = sorted((ROOT / "training" / "miniature" / "configs").glob("*.toml"))
PAPERS_TASKS = ["everything", "style", "object", "composition", "face"]


def head_of(config: Path) -> list[str]:
    """The comment above the settings, a word each line of it."""
    lines = config.read_text().splitlines()
    return [line.removeprefix("# ") for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")]]


def settings(name: str, folder: str = "training/configs"):
    command = shlex.split(head_of(ROOT / folder / f"{name}.toml")[0])
    verb = command[command.index("training") + 1]
    return read_config(verb, [str(ROOT / command[-1])])[0]


def single_task(task: str, folder: str = "training/configs/train"):
    """The options that the head of ablation.toml gives, for one task."""
    path = ROOT / folder / "ablation.toml"
    options = re.search(r"--tasks style=1 --out \S+style\b", " ".join(head_of(path)))[0]
    return read_config("train", [str(path), *options.replace("style", task).split()])[0]


@pytest.mark.parametrize("config", [*CONFIGS, *MINIATURE], ids=lambda path: "-".join(path.with_suffix("").parts[-3:]))
def test_a_config_says_how_it_is_run_and_parses(config: Path) -> None:
    head = head_of(config)
    command = shlex.split(head[0])
    assert command[:3] == ["python", "-m", "training"] or command[:4] == ["accelerate", "launch", "-m", "training"]
    verb = command[command.index("training") + 1]
    assert verb in VERBS and command[-1] == config.relative_to(ROOT).as_posix() and len(head) > 1
    parsed, _ = read_config(verb, [str(config)])
    texts = [value for value in _leaves(tomllib.loads(config.read_text())) if isinstance(value, str)]
    assert not any(text.startswith(("/", "~", ".")) for text in texts), "a path of somebody's machine"
    assert config.parent.name in ("configs", {"figures": "evaluate"}.get(verb, verb))
    if config.stem not in ("debug", "debug_sd3", "debug_sd35", "walk") and verb == "train":
        assert parsed.out.name == config.stem, "two configs would share a run"


def _leaves(value: object) -> list[object]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


def test_the_main_model_is_trained_as_in_the_paper() -> None:
    main = settings("train/main")  # Sec. 3.5
    assert (main.batch_size, main.learning_rate, main.steps) == (512, 1e-6, 100_000)
    assert main.projector == "paper" and "ip-adapter-plus_sd15" in main.start.name
    assert main.instructions == "bank" and not main.tasks
    # IPAdapter's training procedure, which the paper follows: constant rate, 5 % of each kind of dropout.
    assert (main.schedule, main.warmup, main.weight_decay) == ("constant_with_warmup", 0, 0.01)
    assert set(main.dropout.model_dump().values()) == {0.05}


def test_the_ablations_differ_from_one_another_in_one_thing_alone() -> None:
    joint = settings("train/ablation")  # Sec. 3.5: "a batch size of 64 and a learning rate of 1e-7 for 100000 steps"
    assert (joint.batch_size, joint.learning_rate, joint.steps) == (64, 1e-7, 100_000)
    assert joint.model_copy(update={"out": 0, "batch_size": 0, "learning_rate": 0}) == settings(
        "train/main"
    ).model_copy(update={"out": 0, "batch_size": 0, "learning_rate": 0})
    fixed = settings("train/fixed_instructions")  # Sec. 4.3
    assert fixed.instructions == "fixed"
    assert fixed.model_copy(update={"out": joint.out, "instructions": "bank"}) == joint
    for task in PAPERS_TASKS:  # Sec. 4.2
        single = single_task(task)
        assert single.tasks == {Task(task): 1.0}
        assert single.model_copy(update={"out": joint.out, "tasks": {}}) == joint


@pytest.mark.parametrize(
    ("name", "limit"), [("replication", 42_000), ("style", 20_000), ("object", 35_000), ("face", 40_000)]
)
def test_the_datasets_are_as_large_as_the_papers(name: str, limit: int) -> None:
    config = settings(f"build/{name}")  # Secs. 3.4 and 4.1
    assert (config.limit, config.validation, config.source.kind) == (limit, 1000, name)


def test_what_one_config_writes_another_reads() -> None:
    built = {settings(f"build/{task}").out for task in ("replication", "style", "object", "composition", "face")}
    encode, evaluate, figures = (settings(name) for name in ("encode/sd15", "evaluate/table", "evaluate/figures"))
    assert built == set(encode.data) == set(evaluate.data)
    assert settings("train/main").features == encode.out
    assert set(figures.runs.values()) <= {
        settings("train/ablation").out,
        *(single_task(task).out for task in PAPERS_TASKS),
    }
    assert figures.pictures == evaluate.out and {figures.against, *figures.rows} == set(evaluate.rows)
    same = ("base", "image_encoder", "instruction_encoder")
    assert [getattr(encode, name) for name in same] == [getattr(evaluate, name) for name in same]
    encoding = "training/configs/encode/sd15.toml"
    for name in ("train/released_sd15", "train/sdxl", "train/sd3", "train/sd35"):
        # Their features: this, with options in their heads.
        head, config = " ".join(head_of(ROOT / "training" / "configs" / f"{name}.toml")), settings(name)
        changed, _ = read_config("encode", [str(ROOT / encoding), *shlex.split(head[head.index(encoding) :])[1:]])
        assert (changed.out, changed.base) == (config.features, config.base)


def test_the_miniatures_figures_show_what_its_runs_and_its_evaluation_wrote() -> None:
    evaluate, figures, curves = (
        settings(name, "training/miniature/configs") for name in ("evaluate", "figures", "curves")
    )
    assert figures.pictures == evaluate.out and {figures.against, *figures.rows} <= set(evaluate.rows)
    assert {*figures.curves, *curves.curves} == {Task(task) for task in PAPERS_TASKS}
    folder = "training/miniature/configs"
    trained = {tomllib.loads(config.read_text()).get("out") for config in MINIATURE}
    trained |= {str(single_task(task, folder).out) for task in PAPERS_TASKS}
    assert {str(run) for run in (*figures.runs.values(), *curves.runs.values())} <= trained


# The debug walk


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory):
    """Every verb on what `python -m training.debug` makes, as the README has them one after another."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("walk")
    patch.chdir(folder)

    def verb(*arguments: str) -> None:
        words = [str(ROOT / word) if word.startswith("training/") else word for word in arguments]
        patch.setattr(sys, "argv", ["training", *words])
        command_line.main()

    debug.make(Path("debug"))
    verb("build", "training/configs/build/debug.toml")
    verb("encode", "training/configs/encode/debug.toml")
    verb("train", "training/configs/train/debug.toml")
    verb("export", "--run", "debug/run", "--out", "debug/adapter.safetensors")
    verb("evaluate", "training/configs/evaluate/debug_table.toml")
    verb("figures", "training/configs/evaluate/debug_figures.toml")
    yield folder / "debug", verb
    patch.undo()


def test_the_walk_builds_and_encodes_all_five_tasks(walk) -> None:
    folder, _ = walk
    manifest = json.loads((folder / "data" / "own" / "manifest.json").read_text())
    assert manifest["tasks"] == dict.fromkeys(sorted(PAPERS_TASKS), debug.SAMPLES)
    assert manifest["counts"] == {"train": 180, "validation": 20} and not manifest["skipped"]
    assert (folder / "features" / "instructions.safetensors").stat().st_size > 1e6


def test_the_walk_learns_and_validates_on_every_task(walk) -> None:
    folder, _ = walk
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["loss"] < log[0]["loss"]
    validation = [json.loads(line) for line in (folder / "run" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation] == [20, 40, 60]
    assert all(set(PAPERS_TASKS) <= line.keys() and "CLIP-P" in line["face"] for line in validation)
    sheets = sorted(path.stem for path in (folder / "run" / "validation" / "step-00000060").iterdir())
    assert sheets == sorted(PAPERS_TASKS)
    assert any(path.name.startswith("events.out.tfevents") for path in (folder / "run").rglob("*"))


def test_the_walk_resumes(walk, caplog: pytest.LogCaptureFixture) -> None:
    folder, verb = walk
    last = folder / "run" / "checkpoints" / "step-00000060" / "adapter.safetensors"
    before = load_file(last)
    for name in ("step-00000040", "step-00000060"):
        assert checkpoints.is_whole(folder / "run" / "checkpoints" / name)
    last.unlink()
    with caplog.at_level("INFO"):
        verb("train", "training/configs/train/debug.toml")
    assert "going on from debug/run/checkpoints/step-00000040" in caplog.text
    after = load_file(last)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_the_walk_ends_in_a_file_that_the_core_loads(walk) -> None:
    folder, _ = walk
    config = load(folder / "adapter.safetensors").config
    assert config.follows_instructions and config.instruction_encoder.value == "open_clip" and not config.reads_prompt


def test_the_walk_makes_a_table_and_every_figure(walk) -> None:
    folder, _ = walk
    table = (folder / "evaluation" / "table.md").read_text()
    assert "| IPAdapter-Instruct |" in table and "| IPAdapter+ |" in table and "–" not in table
    figures = sorted(path.stem for path in (folder / "figures").iterdir())
    assert figures == ["against", "instructions", "learning-curves", "rewordings-0", "tasks"]
    for path in (folder / "figures").iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 8, "an empty picture"


LAYERS = {"sd3": ("joint", ((0, 32), (2, 32))), "sd35": ("image-stream", ((0, 64), (2, 64)))}


def test_the_walk_has_variants_for_sd3_and_sd35(walk) -> None:
    """Of a start that equals the base, to a file in the released layout, on the same features."""
    folder, verb = walk
    verb("encode", "training/configs/encode/debug_sd3.toml")
    for name, (form, layers) in LAYERS.items():
        run = folder / f"run-{name}"
        verb("train", f"training/configs/train/debug_{name}.toml")
        verb("export", "--run", f"debug/run-{name}", "--out", f"debug/adapter-{name}.safetensors")
        validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        losses = [sum(line[task]["loss"] for task in PAPERS_TASKS) for line in validation]
        assert losses[-1] < losses[0]
        for path in max((run / "validation").iterdir()).iterdir():
            assert np.asarray(Image.open(path).convert("L")).std() > 8, "an empty picture"
        config = load(folder / f"adapter-{name}.safetensors").config
        assert (config.base.value, config.form.value, config.layers) == (name, form, layers)
