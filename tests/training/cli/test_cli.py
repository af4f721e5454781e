"""`python -m training`: help that reads well, settings from files and options, and a sentence for every mistake."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.tasks import Task
from training import __main__ as command_line
from training.cli import verbs
from training.cli.verbs import VERBS, read_config
from training.train import export

OWN = 'out = "data/own"\nlimit = 5\n[source]\nkind = "own"\ndata = "pictures"\n'
TRAIN = 'base = "base"\nout = "run"\nfeatures = "features"\n'


def written(folder: Path, text: str) -> str:
    path = folder / "config.toml"
    path.write_text(text)
    return str(path)


def end(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command that fails ends with."""
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert isinstance(left.value.code, str), "it did not end with a sentence"
    return left.value.code


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_tells_of_every_setting_in_plain_words(verb: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as left:
        read_config(verb, ["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m training {verb}" in text and VERBS[verb][2] in text
    for noise in ("None", "(default: )", "{own}", "STR PATH", "unset"):
        assert noise not in text
    assert max(map(len, text.splitlines())) <= 110
    options = re.findall(r"^[│ ] {1,3}(--[a-z][\w.-]*)", text, re.MULTILINE)
    kind = getattr(sys.modules[VERBS[verb][0]], VERBS[verb][1])
    names = {option.removeprefix("--").partition(".")[0].replace("-", "_") for option in options}
    assert names | {"source"} == {*kind.model_fields, "source"}
    assert all(field.description for field in kind.model_fields.values()), "a setting is not explained"


def test_help_with_a_file_shows_its_values(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        read_config("build", [written(tmp_path, OWN), "--help"])
    text = capsys.readouterr().out
    assert "(default: pictures)" in text and "(default: data/own)" in text and "subcommands" not in text


def test_the_usage_names_every_verb(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--help"])
    command_line.main()
    assert capsys.readouterr().out.strip() == verbs.USAGE
    assert all(f"\n  {verb} " in verbs.USAGE for verb in VERBS)
    monkeypatch.setattr(sys, "argv", ["training"])
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == verbs.USAGE


# Settings


def test_options_count_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, TRAIN + "steps = 70\n[validation]\nevery = 5\n")
    config, _ = read_config("train", [path, "--steps", "80", "--validation.samples", "3", "--cpu"])
    assert (config.steps, config.validation.every, config.validation.samples, config.cpu) == (80, 5, 3, True)
    config, _ = read_config("train", [path, "--tasks", "style=2", "face=0.5", "--ema", "0.9"])
    assert config.tasks == {Task.STYLE: 2.0, Task.FACE: 0.5} and config.ema == 0.9


def test_a_path_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    file = written(tmp_path, 'out = "~/out"\n[source]\nkind = "own"\ndata = "~/pictures"\n')
    config, _ = read_config("build", [file])
    assert (config.out, config.source.data) == (tmp_path / "home" / "out", tmp_path / "home" / "pictures")
    config, _ = read_config("build", [file, "--out=~/other", "--source.data", "a~b"])
    assert (config.out, config.source.data) == (tmp_path / "home" / "other", Path("a~b"))
    config, _ = read_config("encode", ["--data", "~/a", "b", "--out", "~", "--base", "b", "--image-encoder", "~/c"])
    assert config.data == [tmp_path / "home" / "a", Path("b")] and config.image_encoder == tmp_path / "home" / "c"


def test_a_source_is_chosen_by_its_name_or_by_the_file(tmp_path: Path) -> None:
    config, _ = read_config("build", [written(tmp_path, OWN), "--source.data", "other", "--limit", "none"])
    assert (config.source.data, config.limit, config.source.task) == (Path("other"), None, None)
    source = ["--source.data", "p", "--source.task", "style"]
    for options in (["own", *source, "--out", "o"], ["--out", "o", "own", *source]):
        config, _ = read_config("build", options)
        assert (config.source.kind, config.source.data, config.out) == ("own", Path("p"), Path("o"))
        assert config.source.task is Task.STYLE


def test_options_of_one_name_are_told_apart() -> None:
    names = ["--source.pictures", "p", "--source.prompts", "art.csv", "--prompts", "endpoint", "--source.targets.base"]
    models = [
        "b",
        "--source.targets.adapter",
        "a",
        "--source.targets.image-encoder",
        "i",
        "--source.targets.steps",
        "4",
    ]
    config, _ = read_config("build", ["style", "--out", "o", *names, *models])
    assert (config.source.prompts, config.prompts, config.source.targets.steps) == (Path("art.csv"), "endpoint", 4)


def test_rows_and_runs_are_given_by_name() -> None:
    common = ["--base", "b", "--image-encoder", "i", "--data", "d", "--out", "o", "--scorer", "s"]
    rows = ["--rows", "joint:all=a.safetensors", "single-task:style=s=1.safetensors", "single-task:face=f.safetensors"]
    config, _ = read_config("evaluate", [*common, *rows])
    assert config.rows == {
        "joint": {"all": Path("a.safetensors")},
        "single-task": {"style": Path("s=1.safetensors"), "face": Path("f.safetensors")},
    }
    config, _ = read_config("figures", ["--output", "o", "--runs", "joint=runs/main", "style only=runs/style"])
    assert config.runs == {"joint": Path("runs/main"), "style only": Path("runs/style")}


# Mistakes: (verb, file or "", options, what is said)

MISTAKES = {
    "unknown setting": ("train", TRAIN + "stepss = 3\n", [], "stepss is no setting; perhaps steps is meant"),
    "unknown nested setting": (
        "train",
        TRAIN + "[validation]\nevry = 3\n",
        [],
        "validation.evry is no setting; perhaps",
    ),
    "unknown source setting": ("build", OWN + 'dtaa = "x"\n', [], "source.dtaa is no setting; perhaps data is meant"),
    "far from any setting": ("export", 'zzz = 1\nrun = "r"\nout = "o"\n', [], "zzz is no setting; there are run, out,"),
    "unknown kind": ("build", OWN.replace("own", "imagenet"), [], "'replication', 'style', 'object'"),
    "missing setting": ("train", 'base = "b"\nfeatures = "f"\n', [], "out is missing"),
    "wrong type": ("train", TRAIN + 'steps = "many"\n', [], "steps = 'many': input should be a valid integer"),
    "out of range": ("train", TRAIN + "batch_size = 0\n", [], "batch_size = 0: input should be greater than or equal"),
    "nested out of range": ("train", TRAIN + "[validation]\nsamples = 0\n", [], "validation.samples = 0: input"),
    "settings that contradict": (
        "train",
        TRAIN + 'data = ["d"]\n',
        [],
        "give either `features` (from encode) or `data`",
    ),
    "unknown task": ("train", TRAIN + "[tasks]\ntexture = 1\n", [], "tasks.texture"),
    "no TOML": ("train", "base = \n", [], "is not TOML"),
    "unknown option": ("export", "", ["--run", "r", "--out", "o", "--stpe", "3"], "Unrecognized options: --stpe"),
    "missing option": ("export", "", ["--run", "r"], "Missing from python -m training export: --out PATH;"),
    "option of a wrong type": (
        "export",
        "",
        ["--run", "r", "--out", "o", "--step", "three"],
        "--step: invalid literal",
    ),
    "option out of range": ("instructions", "", ["--endpoint.attempts", "0"], "endpoint.attempts = 0: input should be"),
    "option without value": ("build", "", ["own", "--out", "o", "--source.data"], "Missing value for argument"),
    "no choice": ("instructions", "", ["--task", "pose"], "invalid choice 'pose' for argument '--task'"),
    "no mapping": ("figures", "", ["--output", "o", "--runs", "main"], "'main' is not NAME=VALUE"),
    "contradicting options": ("train", "", ["--base", "b", "--out", "o"], "give either `features` (from encode)"),
}


@pytest.mark.parametrize(("verb", "file", "options", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_sentence(verb, file, options, said, tmp_path: Path, monkeypatch, capsys) -> None:
    message = end(monkeypatch, verb, *([written(tmp_path, file)] if file else []), *options)
    assert message.startswith(f"{verb}: ") and said in message
    assert message.endswith(".") and "\n" not in message and "--- " not in message and "pydantic" not in message
    assert capsys.readouterr() == ("", "")


def test_a_missing_file_and_a_mistyped_verb(monkeypatch) -> None:
    assert "There is no file x.toml" in end(monkeypatch, "train", "x.toml")
    assert end(monkeypatch, "trian") == "There is no verb trian; perhaps train is meant."
    assert "instructions, build, encode" in end(monkeypatch, "zzzzz")


FAULTS = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "out"), "The disk is full; make room"),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "a/b"),
        "a/b cannot be used: Permission denied.",
    ),
    "memory of the card": (
        torch.OutOfMemoryError("CUDA out of memory."),
        "The card's memory is full; lower the size of batches or validation.pictures, or",
    ),
    "Ctrl-C": (KeyboardInterrupt(), "stopped; the same command goes on"),
}


@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_ends_in_one_sentence(fault: BaseException, said: str, monkeypatch) -> None:
    def fail(config: object) -> None:
        raise fault

    monkeypatch.setattr(export, "run", fail)
    message = end(monkeypatch, "export", "--run", "r", "--out", "o")
    assert message.startswith(f"export: {said}") and message.count("\n") == 0


def test_a_path_that_is_no_folder_ends_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    options = ["figures", "--output", str(tmp_path / "file" / "figures"), "--runs", f"a={tmp_path}"]
    assert end(monkeypatch, *options).endswith("cannot be used: Not a directory.")


def test_a_programmers_mistake_keeps_its_trace(monkeypatch) -> None:
    monkeypatch.setattr(export, "run", lambda config: config.no_such_name)
    monkeypatch.setattr(sys, "argv", ["training", "export", "--run", "r", "--out", "o"])
    with pytest.raises(AttributeError):
        command_line.main()
