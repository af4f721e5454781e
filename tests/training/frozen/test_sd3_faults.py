"""Damaged and unfit folders of SD3 and SD3.5: each is told in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.tiny.diffusers_models import SD35, save_sd3
from training.datasets.targets.makers import Generator
from training.datasets.targets.settings import Scribble
from training.frozen.base import load_base


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("bases") / "sd35", **SD35)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SCHEDULE = ("scheduler", "scheduler_config.json")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: shutil.rmtree(path / "tokenizer_3"), r"tokenizer_3 is no tokenizer \(.*\); download the folder"),
        (lambda path: shutil.rmtree(path / "text_encoder_3"), "lacks its text_encoder_3"),
        (lambda path: shutil.rmtree(path / "transformer"), "lacks its transformer"),
        (lambda path: (path / "transformer" / "config.json").write_text("<html>"), "transformer cannot be read"),
        (
            lambda path: edit(path / "transformer" / "config.json", qk_norm=None),
            r"holds \d+ weights that its config.json has no place for \(transformer_blocks.0.attn",
        ),
        (
            lambda path: edit(path.joinpath(*SCHEDULE), _class_name="EulerDiscreteScheduler"),
            "follows the noise schedule of EulerDiscreteScheduler, not SD3's; give SD3 medium's folder or SD3.5's",
        ),
        (lambda path: edit(path.joinpath(*SCHEDULE), use_dynamic_shifting=True), "follows the noise schedule of Flow"),
    ],
)
def test_a_damaged_folder(sd35: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    folder = shutil.copytree(sd35, tmp_path / "base", copy_function=shutil.copyfile)
    damage(folder)
    with pytest.raises(ValueError, match=sentence) as told:
        load_base(folder)
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


def test_targets_are_made_with_other_bases(sd35: Path) -> None:
    with pytest.raises(ValueError) as told:
        Generator(Scribble(base=sd35, controlnet=sd35))
    assert str(told.value) == (
        f"{sd35} is SD3.5; pictures of prompts are made with SD1.5 or SDXL, so give one of these."
    )
