"""The first walk of the pages, shortened: each of its commands runs, and the adapter begins to listen."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import __main__ as command_line
from training.features import encode
from training.instructions import load_bank
from training.miniature import __main__ as miniature

ROOT = Path(__file__).resolve().parents[3]
SHORTER = {
    "build": ["--count", "40", "--validation", "20"],
    "train": ["--steps", "6", "--validation.every", "3", "--validation.samples", "4", "--validation.pictures", "1"],
    "evaluate": ["--count", "2", "--steps", "1", "--examples", "1"],
}


def commands(page: Path) -> list[list[str]]:
    """The words of a page's commands on the folder ``walk``."""
    return [shlex.split(line) for line in re.findall(r"^\$? ?(python -m training.* .*walk.*)$", page.read_text(), re.M)]


def test_both_pages_have_the_same_walk() -> None:
    short, long = commands(ROOT / "README.md"), commands(ROOT / "training" / "README.md")
    assert len(short) == 6 and [one for one in long if one in short] == short


def test_the_walk_teaches_an_adapter_to_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = {task: phrases[:4] for task, phrases in load_bank().items()}  # all of them would take a minute
    monkeypatch.setattr(encode, "load_bank", lambda: bank)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training").symlink_to(ROOT / "training")
    for words in commands(ROOT / "README.md"):
        main = miniature.main if words[2] == "training.miniature" else command_line.main
        monkeypatch.setattr(sys, "argv", [*words[2:], *SHORTER.get(words[3], [])])
        main()
    lines = [json.loads(line) for line in Path("walk/run/validation.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [3, 6]
    listens = [[figures["listens_tokens"] for figures in line.values()] for line in lines]
    assert len(listens[0]) == 5 and all(0 < first < second for first, second in zip(*listens, strict=True))
    with Image.open("walk/evaluation/pictures.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 20
