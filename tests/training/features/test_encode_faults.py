"""`encode` meets damaged pictures and shards, other settings and missing models."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from encoded import SMALL_BANK, TASK, of_folder, samples_of, settings
from tiny_base import WIDTH, save_open_clip, save_sd15
from training.datasets.index import Shards
from training.datasets.sample import Sample
from training.datasets.shards import MANIFEST, Tally, read_manifest, write_shard
from training.features import encode
from training.files import sha256, write_json


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few phrasings, since encoding thousands takes longest."""
    monkeypatch.setattr(encode, "load_bank", lambda: SMALL_BANK)


@pytest.mark.usefixtures("small_bank")
def test_tables_too_large_for_the_memory_are_refused_at_once(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (4 + 4 * 3) * 77 * WIDTH * 4  # of the task and of four subjects with three phrases each
    config = settings(workshop, tmp_path / "out", phrases_per_subject=3)
    monkeypatch.setattr(encode, "LARGEST_TABLES", size - 1)
    with pytest.raises(ValueError, match=r"^The instructions of 4 subjects would take .* lower phrases_per_subject"):
        encode.run(config)
    assert not list((tmp_path / "out").rglob("*.tar"))
    monkeypatch.setattr(encode, "LARGEST_TABLES", size)
    encode.run(config)


@pytest.fixture(scope="module")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    save_sd15(folder / "base", seed=5)
    save_open_clip(folder / "clip", seed=6)
    return folder


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param("resolution", "resolution = 64, not 32", id="resolution"),
        pytest.param("precision", "precision = fp32, not bf16", id="precision"),
        pytest.param("base", r"encoders.vae = \w{12}…, not \w{12}…", id="base"),
        pytest.param("image_encoder", r"encoders.image_encoder = \w{12}…, not \w{12}…", id="image"),
        pytest.param("instruction_encoder", "instruction_encoder = clip_l, not open_clip", id="words"),
    ],
)
def test_features_of_one_folder_are_made_alike(
    workshop: Path, features: Path, other_models: Path, changed: str, told: str
) -> None:
    values = {
        "resolution": 32,
        "precision": "bf16",
        "base": other_models / "base",
        "image_encoder": other_models / "clip",
        "instruction_encoder": str(other_models / "clip"),
    }
    before = {name: content for name, content in of_folder(features).items() if not name.startswith("instructions")}
    with pytest.raises(ValueError, match=rf"^\S+ holds features made with {told}; give it as it was, or an"):
        encode.run(settings(workshop, features, **{changed: values[changed]}))
    assert before == {name: content for name, content in of_folder(features).items() if name in before}


@pytest.fixture
def data(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the workshop's shards, to be damaged."""
    return Path(shutil.copytree(workshop / "data" / TASK.value, tmp_path / "data" / TASK.value))


def damage_pictures(data: Path, name: str, *numbers: int) -> None:
    """Cut the condition short, and keep the manifest true."""
    shard = Shards([data / name], Tally(0.0))
    samples = [(key, Sample.from_members(files)) for key, files in map(shard.read, range(len(shard)))]
    for n in numbers:
        key, sample = samples[n]
        samples[n] = key, replace(sample, condition=sample.condition[: len(sample.condition) // 2])
    write_shard(data / name, [(key, sample.members()) for key, sample in samples])
    manifest = read_manifest(data, "build")
    entry = next(entry for entry in manifest["shards"] if entry["name"] == name)
    entry["sha256"] = sha256(data / name)
    write_json(data / MANIFEST, manifest)


@pytest.mark.usefixtures("small_bank")
def test_a_truncated_picture_is_skipped_and_named(
    workshop: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_pictures(data, "train-00001.tar", 2)
    caplog.set_level(logging.WARNING, "ipadapter_instruct")
    for _ in range(2):  # a second run tells it again
        caplog.clear()
        encode.run(settings(workshop, tmp_path / "out", data=[data], max_skipped=0.1))
        [message] = caplog.messages
        assert message.startswith("encode: skipped object/train-00001.tar/000000006: the picture cannot be read (")
    keys = [json.loads(files["json"])["source_id"] for files in samples_of(tmp_path / "out" / TASK.value, "train")]
    assert keys == [f"train-{n}" for n in range(8) if n != 6]


@pytest.mark.usefixtures("small_bank")
def test_too_many_damaged_pictures_end_the_run_until_they_are_mended(
    workshop: Path, data: Path, tmp_path: Path
) -> None:
    whole = (data / "train-00001.tar").read_bytes(), (data / MANIFEST).read_bytes()
    damage_pictures(data, "train-00001.tar", 1, 2)
    broken = (data / "train-00001.tar").read_bytes()
    (data / MANIFEST).write_bytes(whole[1])  # as where a copy went wrong: the manifest is that of the whole shards
    config = settings(workshop, tmp_path / "out", data=[data], max_skipped=0.1)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"^2 of 10 items could not be used \(object/train-00001.tar/000000005: .* share of 0\.1 ",
        ):
            encode.run(config)
    assert not (tmp_path / "out" / TASK.value / "train-00001.tar").exists()
    assert broken != whole[0]
    (data / "train-00001.tar").write_bytes(whole[0])
    encode.run(config)
    assert len(samples_of(tmp_path / "out" / TASK.value, "train")) == 8


@pytest.mark.usefixtures("small_bank")
def test_a_truncated_shard_is_skipped_and_counts_whole(
    workshop: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = data / "train-00000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"^4 of 10 items could not be used \(object/train-00000.tar: not a whole shard"
    ):
        encode.run(settings(workshop, tmp_path / "out", data=[data], max_skipped=0.3))
    encode.run(settings(workshop, tmp_path / "out", data=[data], max_skipped=0.4))
    assert "skipped object/train-00000.tar: not a whole shard" in caplog.text
    assert len(samples_of(tmp_path / "out" / TASK.value, "train")) == 4


@pytest.mark.usefixtures("small_bank")
def test_features_are_held_to_their_shards(workshop: Path, data: Path, tmp_path: Path) -> None:
    encode.run(settings(workshop, tmp_path / "out", data=[data]))
    damage_pictures(data, "validation-00000.tar", 0)
    with pytest.raises(ValueError, match=r"made with source.validation-00000.tar = \w{12}…, not "):
        encode.run(settings(workshop, tmp_path / "out", data=[data]))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        pytest.param("data", "nowhere holds no manifest.json; make it with `python -m training build`", id="data"),
        pytest.param("base", "There is no base model .*nowhere; give a diffusers folder", id="base"),
        pytest.param("image_encoder", "There is no image encoder .*nowhere; give an open_clip file", id="image"),
        pytest.param("instruction_encoder", 'There is no instruction encoder .*nowhere; give "clip-l"', id="words"),
    ],
)
def test_what_is_missing_is_told(workshop: Path, tmp_path: Path, setting: str, told: str) -> None:
    place = tmp_path / "nowhere"
    values = {"data": [place], "base": place, "image_encoder": place, "instruction_encoder": str(place)}
    with pytest.raises(ValueError, match=told):
        encode.run(settings(workshop, tmp_path / "out", **{setting: values[setting]}))
