"""The configs are what they say: they parse, and hold the paper's values."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tomllib
from ipadapter_instruct_core.tasks import Task
from training.cli.verbs import VERBS, read_config

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


def single_task(task: str, config: str = "training/configs/train/ablation"):
    """A joint model's config with the options that its head gives for one task."""
    path = ROOT / f"{config}.toml"
    options = re.search(r"--tasks style=1 .*?--out \S+style\b", " ".join(head_of(path)))[0]
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
    if config.stem != "walk" and verb == "train":
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


def test_the_miniatures_claim_is_of_equal_samples_a_task_and_its_table_shows_what_it_wrote() -> None:
    folder = "training/miniature/configs"
    joint, evaluate, figures = (settings(name, folder) for name in ("claim", "evaluate", "figures"))
    singles = {task: single_task(task, f"{folder}/claim") for task in PAPERS_TASKS}
    for task, single in singles.items():
        assert (single.tasks, single.batch_size * len(PAPERS_TASKS)) == ({Task(task): 1.0}, joint.batch_size)
        changed = ("out", "tasks", "batch_size", "micro_batch_size")
        assert single.model_copy(update={name: getattr(joint, name) for name in changed}) == joint
    last = f"snapshots/step-{joint.steps:08d}.safetensors"
    assert evaluate.rows["Single-task models"] == {task: single.out / last for task, single in singles.items()}
    assert evaluate.rows["IPAdapter-Instruct"] == {"all": joint.out / last}
    assert figures.pictures == evaluate.out and {figures.against, *figures.rows} <= set(evaluate.rows)
