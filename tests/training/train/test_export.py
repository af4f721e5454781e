"""`export`: a checkpoint becomes a file in the released layout, its bits unchanged, that says what it is."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core import checkpoint
from ipadapter_instruct_core.config import InstructionEncoder
from safetensors.torch import load_file
from training.train import checkpoints
from training.train.export import ExportConfig, run

from runs import train, weights

LAST, EARLIER = "step-00000008", "step-00000004"


@pytest.fixture(scope="module")
def trained(workshop: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "run"
    tasks = {"style": 2.0, "object": 1.0, "everything": 0.0}
    train(workshop, out, projector="released", ema=0.5, tasks=tasks)
    return out


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """The core loads the file strictly, and finds these weights in it."""
    found = checkpoint.load(path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_average_is_exported_where_it_was_kept(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    run(ExportConfig(run=trained, out=out))
    average, plain = weights(trained, "average.safetensors"), weights(trained)
    assert not torch.equal(average["image_proj.latents"], plain["image_proj.latents"])
    assert_holds(out, average)
    assert load_file(out).keys() == plain.keys()  # flat and in the released names, nothing beside


def test_the_weights_themselves_on_request(trained: Path, tmp_path: Path) -> None:
    run(ExportConfig(run=trained, out=tmp_path / "adapter.safetensors", averaged=False))
    assert_holds(tmp_path / "adapter.safetensors", weights(trained))


def test_an_earlier_step_on_request(trained: Path, tmp_path: Path) -> None:
    run(ExportConfig(run=trained, out=tmp_path / "adapter.safetensors", step=4))
    _, metadata = checkpoint.read(tmp_path / "adapter.safetensors")
    assert metadata["steps"] == "4"
    assert_holds(tmp_path / "adapter.safetensors", load_file(trained / "checkpoints" / EARLIER / "average.safetensors"))


def test_half_is_rounded_and_half_the_size(trained: Path, tmp_path: Path) -> None:
    sizes = []
    for half in (False, True):
        out = tmp_path / f"{half}.safetensors"
        run(ExportConfig(run=trained, out=out, half=half))
        sizes.append(out.stat().st_size)
    assert_holds(
        tmp_path / "True.safetensors", {k: v.half() for k, v in weights(trained, "average.safetensors").items()}
    )
    assert 0.5 <= sizes[1] / sizes[0] < 0.6  # the header stays


def test_the_authors_own_format(trained: Path, tmp_path: Path) -> None:
    run(ExportConfig(run=trained, out=tmp_path / "adapter.bin", averaged=False))
    content = torch.load(tmp_path / "adapter.bin", weights_only=True)
    assert {"image_proj", "ip_adapter"} <= content.keys()
    assert torch.equal(content["ip_adapter"]["1.to_k_ip.weight"], weights(trained)["ip_adapter.1.to_k_ip.weight"])
    assert_holds(tmp_path / "adapter.bin", weights(trained))
    _, metadata = checkpoint.read(tmp_path / "adapter.bin")
    assert metadata["steps"] == "8"


def sha256_of_training_shards(features: Path) -> str:
    manifests = [json.loads(path.read_text())["source"] for path in features.glob("*/manifest.json")]
    hashes = sorted(sha for source in manifests for name, sha in source.items() if name.startswith("train"))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def test_the_file_says_what_it_is(trained: Path, features: Path, tmp_path: Path) -> None:
    run(ExportConfig(run=trained, out=tmp_path / "adapter.safetensors"))
    _, metadata = checkpoint.read(tmp_path / "adapter.safetensors")
    settings = json.loads(metadata.pop("settings"))
    assert settings["seed"] == 0 and settings["steps"] == 8 and settings["tasks"]["style"] == 2.0
    assert "out" not in settings and not re.search(r"[\\/]", json.dumps(settings))  # nobody's folders
    assert metadata.pop("data_sha256") == sha256_of_training_shards(features)
    assert metadata == {
        "format": "pt",
        "architecture": "ip-adapter-instruct",
        "projector": "released",
        "base": "sd15",
        "instruction_encoder": "clip_l",
        "steps": "8",
        "tasks": "style,object",
    }
    assert checkpoint.load(tmp_path / "adapter.safetensors").config.instruction_encoder is InstructionEncoder.CLIP_L


def test_an_exported_file_is_a_start_again(workshop: Path, trained: Path, tmp_path: Path) -> None:
    run(ExportConfig(run=trained, out=tmp_path / "adapter.safetensors"))
    start = tmp_path / "adapter.safetensors"
    again = train(workshop, tmp_path / "run", projector="released", start=start, steps=1, learning_rate=1e-12)
    for key, tensor in load_file(start).items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-9)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_the_folder_of_the_file_is_made(copied: Path, tmp_path: Path) -> None:
    """A fresh checkout has no `adapters`."""
    out = tmp_path / "adapters" / "sd15" / "main.bin"
    run(ExportConfig(run=copied, out=out))
    assert checkpoint.load(out).config.layers


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_not_exported(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil(copied / "checkpoints" / LAST / "average.safetensors")
    run(ExportConfig(run=copied, out=tmp_path / "adapter.safetensors"))
    assert checkpoint.read(tmp_path / "adapter.safetensors")[1]["steps"] == "4"
    assert f"{LAST} is damaged and was passed over" in caplog.text
    with pytest.raises(ValueError, match=r"copy holds no whole checkpoint of step 8\.$"):
        run(ExportConfig(run=copied, out=tmp_path / "other.safetensors", step=8))
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param(lambda copy: {"step": 7}, r"copy holds no whole checkpoint of step 7\.$", id="step"),
        pytest.param(lambda copy: {"run": copy / "nothing"}, r"nothing holds no whole checkpoint\.$", id="run"),
        pytest.param(
            lambda copy: {"out": copy / "adapter.pt"}, "adapter.pt is no name for an adapter file; end it in", id="name"
        ),
    ],
)
def test_what_cannot_be_exported_is_told(copied: Path, changes: Callable[[Path], dict[str, object]], told: str) -> None:
    values = {"run": copied, "out": copied / "adapter.safetensors"} | changes(copied)
    with pytest.raises(ValueError, match=told):
        run(ExportConfig(**values))


def write_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "weights").write_text(text)


def test_checkpoints_keep_the_newest_that_are_good(tmp_path: Path) -> None:
    """A later one that is damaged, from before a run went on from an earlier one, pushes none of them out."""
    for step in (1, 2, 3, 9):
        checkpoints.save(tmp_path, step, write_text(str(step)), {"seed": 5}, keep=2, main=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000009"]
    spoil_me = tmp_path / "step-00000009" / "weights"
    spoil_me.write_text("x")
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000003"
    for step in (4, 5):
        checkpoints.save(tmp_path, step, write_text(str(step)), {"seed": 5}, keep=1, main=True)
        assert checkpoints.newest(tmp_path) == tmp_path / f"step-{step:08d}"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000005", "step-00000009"]
    checkpoints.save(tmp_path, 9, write_text("9"), {"seed": 5}, keep=1, main=True)  # in the damaged one's place
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000009"]
    assert checkpoints.read_state(checkpoints.newest(tmp_path)) == {"step": 9, "seed": 5}


@pytest.mark.parametrize("name", ["weights", "run.json", "hashes.json"])
def test_a_checkpoint_without_one_of_its_files_is_not_whole(tmp_path: Path, name: str) -> None:
    checkpoints.save(tmp_path, 1, write_text("1"), {}, keep=2, main=True)
    folder = checkpoints.path_of(tmp_path, 1)
    assert checkpoints.is_whole(folder)
    (folder / name).unlink()
    assert not checkpoints.is_whole(folder) and checkpoints.newest(tmp_path) is None
