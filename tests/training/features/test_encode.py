"""`encode`: features against the models' own outputs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from encoded import SMALL_BANK, TASK, close, open_clip_model, samples_of, settings, text_states
from ipadapter_instruct_core.encoders import CLIP_MEAN, CLIP_STD
from ipadapter_instruct_core.tasks import PHRASES, Task
from PIL import Image
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from shards_of_photographs import save_shards
from tiny_base import WIDTH
from torch import Tensor
from torch.nn.functional import interpolate
from training.datasets.sample import Sample
from training.datasets.shards import read_manifest
from training.features import encode
from training.instructions import load


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few phrasings, since encoding thousands takes longest."""
    monkeypatch.setattr(encode, "load_bank", lambda: SMALL_BANK)


@pytest.fixture(scope="module")
def pairs(workshop: Path, features: Path) -> list[tuple[Sample, dict[str, Tensor]]]:
    """Every training sample of one task, with its features."""
    raw, encoded = (samples_of(folder / TASK.value, "train") for folder in (workshop / "data", features))
    assert [sample["json"] for sample in raw] == [sample["json"] for sample in encoded]
    return [
        (Sample.from_members(files), load_bytes(found["safetensors"]))
        for files, found in zip(raw, encoded, strict=True)
    ]


def test_latents_are_the_autoencoders(workshop: Path, pairs: list[tuple[Sample, dict[str, Tensor]]]) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(workshop / "base" / "vae")
    for sample, features in pairs:
        small = np.asarray(sample.pictures()[1].resize((64, 64), Image.Resampling.LANCZOS), dtype=np.float32)
        with torch.no_grad():
            distribution = vae.encode(torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
        close(features["latent_mean"], distribution.mean[0] * vae.config.scaling_factor)
        close(features["latent_deviation"], distribution.logvar[0].div(2).exp() * vae.config.scaling_factor)


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


@pytest.mark.usefixtures("small_bank")
def test_a_batch_size_changes_nothing_but_rounding(workshop: Path, pairs: list, tmp_path: Path) -> None:
    encode.run(settings(workshop, tmp_path / "out", batch_size=3))
    for (_, expected), files in zip(pairs, samples_of(tmp_path / "out" / TASK.value, "train"), strict=True):
        found = load_bytes(files["safetensors"])
        assert found.keys() == expected.keys()
        for name in found:
            close(found[name], expected[name])


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
