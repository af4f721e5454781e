"""`encode`: features against the models' own outputs; resuming, ranks, damaged pictures, other settings."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from threading import Barrier

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.encoders import CLIP_MEAN, CLIP_STD
from ipadapter_instruct_core.tasks import PHRASES, Task
from PIL import Image
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from shards_of_photographs import save_shards
from tiny_base import OPEN_CLIP, WIDTH, save_open_clip, save_sd15
from torch import Tensor
from torch.nn.functional import interpolate
from training import encode
from training.datasets.sample import Sample
from training.encode import EncodeConfig
from training.instructions import KEYWORDS, load
from training.shards import MANIFEST, Shards, Tally, read_manifest, sha256, write_json, write_shard
from training.source import FeatureSource

TASK = Task.OBJECT


def settings(workshop: Path, out: Path, *tasks: Task, **changes: object) -> EncodeConfig:
    values = {
        "data": [workshop / "data" / task.value for task in tasks or (TASK,)],
        "base": workshop / "base",
        "image_encoder": workshop / "clip",
        "resolution": 64,
        "precision": "fp32",
        "device": "cpu",
        "out": out,
    }
    return EncodeConfig(**values | changes)


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few phrasings, since encoding thousands takes longest."""
    monkeypatch.setattr(
        encode, "load_bank", lambda: {task: [f"{task.value} {n}" for n in range(3)] for task in KEYWORDS}
    )


def samples_of(folder: Path, split: str) -> list[dict[str, bytes]]:
    paths = sorted(folder.glob(f"{split}-*.tar"))
    shards = Shards(paths, Tally(0.0))
    return [shards[index] for index in range(len(shards))]


@pytest.fixture(scope="module")
def pairs(workshop: Path, features: Path) -> list[tuple[Sample, dict[str, Tensor]]]:
    """Every training sample of one task, with its features."""
    raw, encoded = (samples_of(folder / TASK.value, "train") for folder in (workshop / "data", features))
    assert [sample["json"] for sample in raw] == [sample["json"] for sample in encoded]
    return [
        (Sample.from_members(files), load_bytes(found["safetensors"]))
        for files, found in zip(raw, encoded, strict=True)
    ]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for ``tolerance`` of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_latents_are_the_autoencoders(workshop: Path, pairs: list[tuple[Sample, dict[str, Tensor]]]) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(workshop / "base" / "vae")
    for sample, features in pairs:
        small = np.asarray(sample.pictures()[1].resize((64, 64), Image.Resampling.LANCZOS), dtype=np.float32)
        with torch.no_grad():
            distribution = vae.encode(torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
        close(features["latent_mean"], distribution.mean[0] * vae.config.scaling_factor)
        close(features["latent_deviation"], distribution.logvar[0].div(2).exp() * vae.config.scaling_factor)


def open_clip_model(folder: Path) -> torch.nn.Module:
    from open_clip import CLIP

    model = CLIP(**OPEN_CLIP).eval()
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return model


def penultimate(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    """What the last block of the image tower is given, [B, N, W]."""
    kept = []
    handle = model.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        model.encode_image(pixels)
    handle.remove()
    return kept[0]


def test_image_states_are_open_clips_last_but_one(
    workshop: Path, pairs: list[tuple[Sample, dict[str, Tensor]]]
) -> None:
    model = open_clip_model(workshop / "clip")
    mean, deviation = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    for sample, features in pairs:
        large = torch.from_numpy(np.array(sample.pictures()[0])).permute(2, 0, 1)[None].float()
        small = interpolate(large, (32, 32), mode="bicubic", antialias=True).clamp(0, 255).round() / 255
        pixels = (small - mean[:, None, None]) / deviation[:, None, None]
        close(features["image"], penultimate(model, pixels)[0])


@cache
def text_encoder(folder: Path) -> tuple[object, torch.nn.Module]:
    from transformers import CLIPTextModel, CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), CLIPTextModel.from_pretrained(folder / "text_encoder")


def text_states(workshop: Path, text: str) -> Tensor:
    """[77, 32]: the last states after the final norm."""
    tokenizer, model = text_encoder(workshop / "base")
    tokens = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(tokens.input_ids)[0][0]


def test_text_states_are_the_text_encoders(workshop: Path, pairs: list[tuple[Sample, dict[str, Tensor]]]) -> None:
    for sample, features in pairs[:2]:
        assert sample.prompt.startswith("a photograph of")
        close(features["text"], text_states(workshop, sample.prompt))


def test_rows_are_those_of_dropped_conditions(workshop: Path, features: Path) -> None:
    rows = load_file(features / encode.ROWS)
    assert rows.keys() == {"empty_text", "zero_image", "empty_instruction", "everything_instruction"}
    close(rows["empty_text"], text_states(workshop, ""))
    close(rows["empty_instruction"], text_states(workshop, ""))
    close(rows["everything_instruction"], text_states(workshop, "everything"))
    close(rows["zero_image"], penultimate(open_clip_model(workshop / "clip"), torch.zeros(1, 3, 32, 32))[0])


def test_instructions_are_the_fixed_one_and_then_the_banks(workshop: Path, features: Path) -> None:
    tables = load_file(features / encode.INSTRUCTIONS)
    subjects = {f"object/{name}" for name in ("astronaut", "chelsea", "coffee", "rocket")}
    assert tables.keys() == {"everything", "style", "object"} | subjects
    for task, fixed in (("everything", "use everything from the image"), ("style", "use the style")):
        bank = load(Task(task))
        assert tables[task].shape == (1 + len(bank), 77, WIDTH)
        close(tables[task][0], text_states(workshop, fixed))
        for number in (0, 17, len(bank) - 1):
            close(tables[task][1 + number], text_states(workshop, bank[number]))


def test_a_subjects_instructions_hold_its_name(workshop: Path, features: Path) -> None:
    table = load_file(features / encode.INSTRUCTIONS)["object/chelsea"]
    bank = Random("chelsea").sample(load(TASK), 31)
    assert len(table) == 32
    close(table[0], text_states(workshop, "use the chelsea"))
    plain = [n for n, phrase in enumerate(bank) if phrase.count("the object") == 1 and phrase.count("object") == 1][:3]
    assert len(plain) == 3
    for number in plain:
        close(table[1 + number], text_states(workshop, bank[number].replace("object", "chelsea")))


def test_pictures_are_kept_for_validation_alone(features: Path) -> None:
    assert all(files.keys() == {"json", "safetensors"} for files in samples_of(features / TASK.value, "train"))
    for files in samples_of(features / TASK.value, "validation"):
        assert files.keys() == {"json", "safetensors", "condition", "target"}


def of_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small_bank")
def test_a_batch_size_changes_nothing_but_rounding(workshop: Path, pairs: list, tmp_path: Path) -> None:
    encode.run(settings(workshop, tmp_path / "out", batch_size=3))
    for (_, expected), files in zip(pairs, samples_of(tmp_path / "out" / TASK.value, "train"), strict=True):
        found = load_bytes(files["safetensors"])
        assert found.keys() == expected.keys()
        for name in found:
            close(found[name], expected[name])


@pytest.mark.usefixtures("small_bank")
def test_what_is_done_is_not_done_again(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, interrupted = tmp_path / "once", tmp_path / "interrupted"
    encode.run(settings(workshop, once))
    encode_batch, calls = encode._encode_batch, []

    def third_fails(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_batch(*arguments)

    monkeypatch.setattr(encode, "_encode_batch", third_fails)
    with pytest.raises(KeyboardInterrupt):  # in the middle of the second shard
        encode.run(settings(workshop, interrupted, batch_size=2))
    shards = sorted((interrupted / TASK.value).glob("*.tar"))
    assert [path.name for path in shards] == ["train-00000.tar"]
    made = shards[0].stat().st_mtime_ns
    calls.clear()
    monkeypatch.setattr(encode, "_encode_batch", lambda *arguments: calls.append(arguments) or encode_batch(*arguments))
    encode.run(settings(workshop, interrupted, batch_size=4))
    assert len(calls) == 2 and shards[0].stat().st_mtime_ns == made
    found, expected = of_folder(interrupted), of_folder(once)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected if "train-00000" not in name)
    calls.clear()
    encode.run(settings(workshop, interrupted))
    assert calls == []


@pytest.mark.usefixtures("small_bank")
def test_ranks_share_the_shards(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        encode.run(settings(workshop, tmp_path / "two", Task.STYLE, TASK))
        names.append({str(path.relative_to(tmp_path)) for path in (tmp_path / "two").rglob("*.tar")})
    assert names[0] == {f"two/{task}/train-00001.tar" for task in ("style", "object")}
    assert len(names[1]) == 6
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    encode.run(settings(workshop, tmp_path / "one", Task.STYLE, TASK))
    assert of_folder(tmp_path / "two") == of_folder(tmp_path / "one")


@pytest.mark.usefixtures("small_bank")
def test_a_second_dataset_keeps_the_words_of_the_first(workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode.run(settings(workshop, out, TASK))
    before = load_file(out / encode.INSTRUCTIONS)
    encode.run(settings(workshop, out, Task.STYLE))
    tables = load_file(out / encode.INSTRUCTIONS)
    assert "object/rocket" in before and tables.keys() == before.keys() | {"style"}
    assert all(torch.equal(tables[name], before[name]) for name in before)
    encode.run(settings(workshop, tmp_path / "one", TASK, Task.STYLE))
    assert of_folder(out) == of_folder(tmp_path / "one")
    written = (out / encode.INSTRUCTIONS).stat().st_ino
    encode.run(settings(workshop, out, TASK))
    assert (out / encode.INSTRUCTIONS).stat().st_ino == written  # nothing is new
    encode.run(settings(workshop, out, TASK, phrases_per_subject=2))
    assert len(load_file(out / encode.INSTRUCTIONS)["object/rocket"]) == 2


@pytest.mark.usefixtures("small_bank")
def test_words_are_read_without_the_features(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((features / TASK.value).glob("*.tar"))
    shards = Shards(paths, Tally(0.0))
    assert all(shards.file(n, ending) == content for n in range(2) for ending, content in shards[n].items())
    with pytest.raises(KeyError):
        shards.file(0, "target")
    read, file = [], Shards.file
    monkeypatch.setattr(Shards, "file", lambda shards, n, ending: read.append(ending) or file(shards, n, ending))
    assert FeatureSource(features, "train", Tally(0.0)).by_task.keys() == {Task.EVERYTHING, Task.STYLE, TASK}
    assert encode._tasks_and_subjects(settings(workshop, features))[1] >= {"rocket", "coffee"}
    assert set(read) == {"json"}


@pytest.mark.usefixtures("small_bank")
def test_lost_shards_are_made_again(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(workshop, tmp_path / "out")
    encode.run(config)
    made, folder = of_folder(tmp_path / "out"), tmp_path / "out" / TASK.value
    calls, encode_batch = [], encode._encode_batch
    monkeypatch.setattr(encode, "_encode_batch", lambda *arguments: calls.append(arguments) or encode_batch(*arguments))
    (folder / "train-00000.tar").unlink()
    for name in (
        f"{TASK.value}/.train-00000.tar.99",
        f"{TASK.value}/.train-00000.json.99",
        ".instructions.safetensors.99",
    ):
        (tmp_path / "out" / name).write_bytes(b"left by a killed run")
    (tmp_path / "out" / encode.INSTRUCTIONS).write_bytes(b"half")
    content = made[f"{TASK.value}/validation-00000.tar"]
    (folder / "validation-00000.tar").write_bytes(content[: len(content) // 2])
    encode.run(config)
    assert of_folder(tmp_path / "out") == made
    assert len(calls) == 2  # train-00001 was whole


@pytest.mark.usefixtures("small_bank")
def test_a_shard_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, swap = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or swap(*paths))
    write_shard(tmp_path / "train.tar", [("0", {"json": b"{}"})])
    assert done == [(tmp_path / "train.tar").stat().st_size, "replace"]


def test_many_subjects_take_in_the_bank(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"animal {n}" for n in range(300)}
    monkeypatch.setattr(encode, "_tasks_and_subjects", lambda _: ({TASK}, names))
    config = settings(workshop, tmp_path)
    phrases = encode._phrases(config)
    bank = load(TASK)
    used = set()
    for name in names:
        table = phrases[f"object/{name}"]
        assert len(table) == 32 and table[0] == f"use the {name}"
        used |= {phrase.lower().replace(name, "object") for phrase in table[1:]}
    assert len(used) > 0.95 * len(bank)
    assert phrases == encode._phrases(config)
    assert len(encode._phrases(config.model_copy(update={"phrases_per_subject": 5000}))["object/animal 3"]) == 1201


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


@pytest.mark.usefixtures("small_bank")
def test_targets_that_were_enlarged_are_told_once(
    workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sides = [
        min(Sample.from_members(f).pictures()[1].size) for f in samples_of(workshop / "data" / TASK.value, "train")
    ]
    assert len(set(sides)) == 1
    for side, told in ((sides[0], 0), (sides[0] + 8, 1), (sides[0] + 8, 1)):  # again by a later run
        caplog.clear()
        encode.run(settings(workshop, tmp_path / str(side), resolution=side))
        assert len([message for message in caplog.messages if "enlarged" in message]) == told
    assert f"targets of object are smaller than {side} pixels" in caplog.text
    assert f"(4 of the 4 in train-00000.tar): a model learns their blur; build with a --size of {side}" in caplog.text


@pytest.mark.usefixtures("small_bank")
def test_pictures_are_decoded_side_by_side_and_ahead(
    workshop: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, pictures, encode_batch, decoded, seen = Barrier(2), Sample.pictures, encode._encode_batch, [], []

    def meeting(sample: Sample) -> object:
        two.wait(timeout=20)  # one alone would end in BrokenBarrierError
        decoded.append(sample.source_id)
        return pictures(sample)

    def slow(*arguments: object) -> object:
        time.sleep(0.5)
        seen.append(len(decoded))
        return encode_batch(*arguments)

    monkeypatch.setattr(Sample, "pictures", meeting)
    monkeypatch.setattr(encode, "_encode_batch", slow)
    encode.run(settings(workshop, tmp_path / "out", batch_size=1))
    assert seen[0] >= 2  # the second was decoded before the first was encoded
    for split in ("train", "validation"):
        found, expected = (samples_of(folder / TASK.value, split) for folder in (tmp_path / "out", features))
        assert [files["json"] for files in found] == [files["json"] for files in expected]


@pytest.mark.usefixtures("small_bank")
def test_half_precision_keeps_latents_whole(workshop: Path, pairs: list, tmp_path: Path) -> None:
    encode.run(settings(workshop, tmp_path / "out", precision="fp16"))
    found = load_bytes(samples_of(tmp_path / "out" / TASK.value, "train")[3]["safetensors"])
    for name, expected in pairs[3][1].items():
        assert found[name].dtype == (torch.float32 if name.startswith("latent") else torch.float16)
        close(found[name].float(), expected, 1e-3)
    for path in (encode.ROWS, encode.INSTRUCTIONS):
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / path).values()} == {torch.float16}


@pytest.mark.usefixtures("small_bank")
def test_open_clip_reads_instructions_where_asked(workshop: Path, tmp_path: Path) -> None:
    encode.run(settings(workshop, tmp_path / "out", instruction_encoder=str(workshop / "clip")))
    assert read_manifest(tmp_path / "out", "encode")["instruction_encoder"] == "open_clip"
    model, rows = open_clip_model(workshop / "clip"), load_file(tmp_path / "out" / encode.ROWS)
    from open_clip import SimpleTokenizer

    kept = []
    model.ln_final.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        model.encode_text(SimpleTokenizer(context_length=77)(["", "everything", "use the rocket"]))
    close(rows["empty_instruction"], kept[0][0])
    close(rows["everything_instruction"], kept[0][1])
    close(load_file(tmp_path / "out" / encode.INSTRUCTIONS)["object/rocket"][0], kept[0][2])
    close(rows["empty_text"], text_states(workshop, ""))  # the base's own all the same


@pytest.mark.usefixtures("small_bank")
def test_tasks_beyond_the_papers_have_the_cores_wordings(workshop: Path, tmp_path: Path) -> None:
    save_shards(tmp_path / "poses", Task.POSE, count=1, validation=0)
    encode.run(settings(workshop, tmp_path / "out", data=[tmp_path / "poses"]))
    table = load_file(tmp_path / "out" / encode.INSTRUCTIONS)["pose"]
    assert len(table) == 1 + len(PHRASES[Task.POSE])
    for number, phrase in enumerate(["use the pose", *PHRASES[Task.POSE]]):
        close(table[number], text_states(workshop, phrase))


@pytest.fixture(scope="module")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    save_sd15(folder / "base", seed=5)
    save_open_clip(folder / "clip", seed=6)
    return folder


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param("resolution", "features made with resolution 64, not 32", id="resolution"),
        pytest.param("precision", "features made with precision fp32, not bf16", id="precision"),
        pytest.param("base", r"features made with vae \w{32}, not \w{32}", id="base"),
        pytest.param("image_encoder", r"features made with image encoder \w{32}, not \w{32}", id="image"),
        pytest.param("instruction_encoder", "features made with instruction encoder clip_l, not open_clip", id="words"),
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
    with pytest.raises(ValueError, match=rf"^\S+ holds {told}; choose another folder\.$"):
        encode.run(settings(workshop, features, **{changed: values[changed]}))
    assert before == {name: content for name, content in of_folder(features).items() if name in before}


@pytest.fixture
def data(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the workshop's shards, to be damaged."""
    return Path(shutil.copytree(workshop / "data" / TASK.value, tmp_path / "data" / TASK.value))


def damage_pictures(data: Path, name: str, *numbers: int) -> None:
    """Cut the condition short, and keep the manifest true."""
    shard = Shards([data / name], Tally(0.0))
    samples = [(key, Sample.from_members(shard[n])) for n, (_, key, _) in enumerate(shard.samples)]
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
    with pytest.raises(ValueError, match=r"object holds features made with validation-00000.tar \w+, not \w+; choose"):
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
