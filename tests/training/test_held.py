"""A folder is held to what began it: settings, and the content of what was read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ipadapter_instruct_core.tasks import Task
from pydantic import BaseModel
from shards_of_photographs import save_shards
from training.evaluate import evaluate
from training.features import encode
from training.held import defaults_of, hash_of, hold
from training.instructions import load_bank
from training.train import loop
from training.train.settings import TrainConfig

from runs import settings as run_settings
from runs import train


class Part(BaseModel):
    share: float = 0.5
    newer: int = 1


class Settings(BaseModel):
    needed: str
    seed: int = 0
    rate: float = 1.0
    part: Part = Part()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, r"run holds a thing with seed = 0, not 1; give it as it was, or another folder\.$"),
        ({"part": {"share": 0.1}}, r"part\.share = 0\.5, not 0\.1"),
        ({"part": {"newer": 2}}, r"part\.newer = 1, not 2"),  # which was not kept: it had its default
        ({"rate": 2.0}, r"rate = 1\.0, not 2\.0"),  # nor was this
    ],
)
def test_what_a_kept_config_lacks_had_its_default(tmp_path: Path, change: dict, told: str) -> None:
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"needed": "a", "seed": 0, "part": {"share": 0.5}, "removed since": 3}))
    now = Settings(needed="a").model_dump(mode="json")
    with pytest.raises(ValueError, match=told):
        hold(path, Settings(needed="a", **change).model_dump(mode="json"), "a thing", defaults_of(Settings))
    hold(path, now, "a thing", defaults_of(Settings))
    assert json.loads(path.read_text()) == {**now, "removed since": 3}
    hold(path, now | {"seed": 5}, "a thing", free={"seed"})
    assert json.loads(path.read_text())["seed"] == 5
    hold(path, now | {"needed": "b"}, "a thing", begun=False)
    assert json.loads(path.read_text())["needed"] == "b"


def test_hashes_tell_texts_and_their_order_apart() -> None:
    assert len({hash_of(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])}) == 4


def test_an_older_run_without_the_new_settings_goes_on(workshop: Path, features: Path, tmp_path: Path) -> None:
    """Its config.json lacks the optimiser's settings and all but two of the facts."""
    out = tmp_path / "run"
    train(workshop, out, steps=4)
    path = out / loop.CONFIG
    kept = json.loads(path.read_text())
    new = {"adam_eps", "adam_betas", "optimizer", "unet", "shards", "wordings"}
    assert new <= kept.keys()
    path.write_text(json.dumps({name: value for name, value in kept.items() if name not in new}))
    train(workshop, out, steps=6)
    assert json.loads(path.read_text()) == {**kept, "steps": 6}


@pytest.fixture(scope="module")
def rebuilt(workshop: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop whose data have the same counts and other content."""
    folder = tmp_path_factory.mktemp("rebuilt")
    for name in ("base", "clip", "start.safetensors"):
        (folder / name).symlink_to(workshop / name)
    for task in (Task.EVERYTHING, Task.STYLE, Task.OBJECT):
        save_shards(folder / "data" / task.value, task, seed=1)
    return folder


def encode_config(workshop: Path, out: Path, **changes: object) -> encode.EncodeConfig:
    given = {"data": sorted((workshop / "data").iterdir()), "base": workshop / "base"} | changes
    return encode.EncodeConfig(
        image_encoder=workshop / "clip", resolution=64, precision="fp32", device="cpu", out=out, **given
    )


def test_rebuilt_data_are_refused_by_encode_and_train(workshop: Path, rebuilt: Path, tmp_path: Path) -> None:
    encode.run(encode_config(rebuilt, rebuilt / "features"))
    counts = [json.loads(path.read_text()) for path in sorted((rebuilt / "features").glob("*/*-00000.json"))]
    before = [json.loads(path.read_text()) for path in sorted((workshop / "features").glob("*/*-00000.json"))]
    assert [one["samples"] for one in counts] == [one["samples"] for one in before], "the counts would tell"
    out = tmp_path / "features"
    shutil.copytree(workshop / "features", out)
    with pytest.raises(ValueError, match=r"holds features made with source\.train-00000\.tar = \w{12}…, not \w{12}…"):
        encode.run(encode_config(rebuilt, out))
    train(workshop, tmp_path / "run", steps=4)
    with pytest.raises(ValueError, match=r"run holds a run with shards = \w{12}…, not \w{12}…; give it as it was"):
        loop.run(TrainConfig(**run_settings(rebuilt, tmp_path / "run", steps=6)))


def test_rebuilt_data_are_refused_by_evaluate(workshop: Path, rebuilt: Path, tmp_path: Path) -> None:
    """Pictures of other samples than a row is asked for would stand beside them."""

    def run(data: Path, **changes: object) -> None:
        evaluate.run(
            evaluate.EvaluateConfig(
                rows={"plain": {"all": workshop / "start.safetensors"}}, data=[data / "data" / "style"],
                out=tmp_path / "out", base=workshop / "base", image_encoder=workshop / "clip",
                scorer=workshop / "clip", samples=1, resolution=64, steps=1, device="cpu", **changes,
            )
        )  # fmt: skip

    run(workshop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.jpg")}
    with pytest.raises(
        ValueError, match=r"out holds pictures made with shards = \w{12}…, not \w{12}…; give it as it w"
    ):
        run(rebuilt)
    run(workshop, batch_size=1)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.jpg")} and len(before) == 2


def test_an_edited_line_of_the_bank_is_encoded_anew(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = {task: phrases[:3] for task, phrases in load_bank().items()}
    monkeypatch.setattr(encode, "load_bank", lambda: bank)
    out = tmp_path / "features"
    style = {"data": [workshop / "data" / "style"]}
    encode.run(encode_config(workshop, out, **style))
    path = out / encode.INSTRUCTIONS
    first, made = path.read_bytes(), path.stat().st_mtime_ns
    encode.run(encode_config(workshop, out, **style))
    assert path.stat().st_mtime_ns == made, "made again for nothing"
    bank[Task.STYLE] = [*bank[Task.STYLE][:2], "borrow the brush strokes"]
    encode.run(encode_config(workshop, out, **style))
    assert path.read_bytes() != first and len(path.read_bytes()) == len(first)
