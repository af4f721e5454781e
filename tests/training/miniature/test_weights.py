"""The shipped weights: eight bits a weight, small, alike for alike weights, and honest about where they come from."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core import checkpoint
from safetensors.torch import load, save_file
from training.files import sha256
from training.miniature.expand import write
from training.miniature.judged import report, rounding
from training.miniature.models import weights

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("adapter", "adapter-plain", "autoencoder", "base", "clip", "controlnet", "lora", "oracle")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-4, 1, 40).view(40, 1, 1, 1)
    kernel = torch.randn(40, 32, 3, 3, generator=generator) * sizes
    kernel[7] = 0
    small = {"norm": torch.randn(2000, generator=generator), "last": torch.randn(3, 64, generator=generator)}
    return {"kernel": kernel, **small, "words": torch.arange(5000).view(50, 100)}


def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most(state: dict[str, torch.Tensor], folder: Path) -> None:
    weights.save(state, "some")
    found = weights.read("some")
    assert found.keys() == state.keys()
    steps = state["kernel"].abs().amax(dim=(1, 2, 3)) / 127
    error = (found["kernel"] - state["kernel"]).abs().amax(dim=(1, 2, 3))
    assert (error <= 0.5001 * steps).all() and (error > 0.4 * steps)[steps > 0].all()
    assert torch.equal(found["kernel"][7], state["kernel"][7])
    assert all(torch.equal(found[name], state[name].half().float()) for name in ("norm", "last"))
    assert torch.equal(found["words"], state["words"])


def test_the_file_is_safetensors_with_a_byte_a_weight_and_a_scale_a_channel(state: dict, folder: Path) -> None:
    inside = load(gzip.decompress(weights.save(state, "some").read_bytes()))
    assert {key: tensor.dtype for key, tensor in inside.items()} == {
        "kernel": torch.int8,
        "kernel.scale": torch.float32,
        "norm": torch.float16,
        "last": torch.float16,
        "words": torch.int64,
    }
    assert inside["kernel.scale"].shape == (40,)


def test_alike_weights_are_alike_bytes_whatever_the_order_of_what_they_say(state: dict, folder: Path) -> None:
    about = {f"name {number}": str(number) for number in range(20)}
    one = weights.save(state, "one", about).read_bytes()
    other = weights.save(state, "other", dict(reversed(about.items()))).read_bytes()
    assert one == other and weights.about("one") == about
    assert sorted(path.name for path in folder.iterdir()) == ["one.safetensors.gz", "other.safetensors.gz"]


def test_weights_made_elsewhere_are_kept_with_what_they_say_and_what_they_were(state: dict, folder: Path) -> None:
    folder.mkdir()
    source = folder.parent / "lora.safetensors"
    save_file(state, source, {"steps": "7"})
    weights.run(weights.KeepConfig((source,)))
    assert weights.about("lora") == {"steps": "7", "rounded_from_sha256": sha256(source)}
    assert weights.read("lora").keys() == state.keys()


@pytest.mark.parametrize("damage", [lambda b: b[:-900], lambda b: b"", lambda b: b[:300] + b"\0" * 40 + b[340:]])
def test_a_damaged_file_is_one_sentence(damage: object, state: dict, folder: Path) -> None:
    path = weights.save(state, "some")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"some\.safetensors\.gz is cut short or damaged; take it from the repository"):
        weights.read("some")


def test_a_rounded_tensor_without_its_scales_is_damage(state: dict, folder: Path) -> None:
    path = weights.save(state, "some")
    inside = load(gzip.decompress(path.read_bytes()))
    del inside["kernel.scale"]
    save_file(inside, path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    with pytest.raises(ValueError, match="damaged"):
        weights.read("some")


def test_the_weights_and_the_checkout_are_small() -> None:
    shipped = [weights.path_of(name) for name in NAMES]
    assert {*weights.FOLDER.iterdir()} == {*shipped}
    assert sum(path.stat().st_size for path in shipped) <= 30e6
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:  # a checkout, and not an unpacked archive
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
        assert sum(path.stat().st_size for path in files if path.is_file()) <= 40 * 2**20


def test_the_pages_tables_are_of_the_weights_that_were_rounded() -> None:
    told = re.search(r"joint `(\w+)`, plain `(\w+)`", (ROOT / "docs" / "miniature" / "oracle.md").read_text())
    was = [weights.about(name)["rounded_from_sha256"] for name in ("adapter", "adapter-plain")]
    assert [one[:12] for one in was] == [*told.groups()]


def test_expanded_adapters_are_plain_files_that_say_where_they_come_from(tmp_path: Path) -> None:
    """For ComfyUI, and narrow for training; the core's strict loader opens both."""
    write.write_adapters(tmp_path / "ipadapter_instruct")
    write.write_narrow_adapters(tmp_path)
    for path in ("ipadapter_instruct/miniature.safetensors", "adapter.safetensors"):
        assert checkpoint.load(tmp_path / path).config.follows_instructions
        state, said = checkpoint.read(tmp_path / path)
        assert {tensor.dtype for tensor in state.values()} == {torch.float16}
        assert said == weights.about("adapter")
    narrow, shipped = checkpoint.read(tmp_path / "adapter.safetensors")[0], weights.read("adapter")
    assert all(torch.equal(narrow[key], shipped[key].half()) for key in shipped)
    deaf = checkpoint.load(tmp_path / "adapter-deaf.safetensors")
    assert not deaf.config.follows_instructions and len(deaf.state_dict()) > 60
    assert all(torch.equal(tensor, narrow[key]) for key, tensor in deaf.state_dict().items())


def test_the_cost_of_rounding_is_told_figure_by_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, hits in {"before": 40, "after": 38}.items():
        found = {"trial": "style", "row": "joint", "rates": {"condition style": [hits, 50], "prompt scene": [50, 50]}}
        (tmp_path / name).mkdir()
        content = {"settings": {"count": 50}, "found": {"style | joint": found, name: found}}
        (tmp_path / name / report.RESULTS).write_text(json.dumps(content))
    rounding.run(rounding.RoundingConfig(tmp_path / "before", tmp_path / "after"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| style | joint | condition style | 0.800 | 0.760 | -0.040 |",
        "| style | joint | prompt scene | 1.000 | 1.000 | +0.000 |",
        "",
        "2 figures: from -0.040 to +0.000, mean -0.0200",
    ]
    (tmp_path / "after" / report.RESULTS).write_text(json.dumps({"settings": {"count": 9}, "found": {}}))
    with pytest.raises(ValueError, match="different settings"):
        rounding.run(rounding.RoundingConfig(tmp_path / "before", tmp_path / "after"))
