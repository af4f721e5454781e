"""Adapter files: read and written without loss, whole or not at all, and strictly."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core import checkpoint
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, Base, InstructionEncoder
from ipadapter_instruct_core.convert import convert, main
from small_adapters import PLUS, RELEASED, random_adapter
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def mixed_precision(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's weights, every third one in another precision, with values that rounding would change."""
    return {key: value.to(DTYPES[i % 3]) for i, (key, value) in enumerate(adapter.state_dict().items())}


def released_bin(path: Path, state: dict[str, Tensor]) -> Path:
    """A file as the authors wrote theirs: two nested dictionaries, nothing else."""
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    torch.save(groups, path)
    return path


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
        assert torch.equal(ours[key].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), key


@pytest.mark.parametrize("suffixes", [(".safetensors", ".bin"), (".bin", ".safetensors")], ids="->".join)
def test_there_and_back_keeps_every_bit(tmp_path: Path, any_adapter: Adapter, suffixes: tuple[str, str]) -> None:
    state = mixed_precision(any_adapter)
    source = released_bin(tmp_path / "released.bin", state)
    first, second = (tmp_path / f"converted{suffix}" for suffix in suffixes)
    convert(str(source), str(first))
    convert(str(first), str(second))
    for path in (first, second):
        found, metadata = checkpoint.read(path)
        assert_same_bits(found, state)
        assert metadata == checkpoint.describe(any_adapter.config)
    assert_same_bits(checkpoint.load(second).state_dict(), state)


def test_a_converted_bin_has_the_released_files_nesting(tmp_path: Path, released: Adapter) -> None:
    checkpoint.save(tmp_path / "a.safetensors", released)
    convert(str(tmp_path / "a.safetensors"), str(tmp_path / "a.bin"))
    content = torch.load(tmp_path / "a.bin", weights_only=True)
    assert set(content) == {"image_proj", "ip_adapter", "metadata"}
    assert "latents" in content["image_proj"] and "1.to_k_ip.weight" in content["ip_adapter"]


def test_weights_that_share_memory_are_written_apart(tmp_path: Path, released: Adapter) -> None:
    state = released.state_dict()
    state["ip_adapter.1.to_v_ip.weight"] = state["ip_adapter.1.to_k_ip.weight"]
    state["image_proj.latents"] = torch.randn(1, 1, 48).expand(1, 5, 48)
    for name in ("a.safetensors", "a.bin"):
        checkpoint.write(tmp_path / name, state, {})
        assert_same_bits(checkpoint.read(tmp_path / name)[0], state)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_same_content_is_the_same_bytes(tmp_path: Path, released: Adapter, suffix: str) -> None:
    """Else an evaluation takes an adapter that was exported again for another one."""
    for number in range(5):
        checkpoint.save(
            tmp_path / f"{number}{suffix}", released, tasks='style, \N{GREEK SMALL LETTER BETA} "\x01', steps="7"
        )
    first, *others = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert [other == first for other in others] == [True] * 4
    assert_same_bits(checkpoint.read(tmp_path / f"0{suffix}")[0], released.state_dict())
    assert checkpoint.read(tmp_path / f"0{suffix}")[1]["tasks"] == 'style, \N{GREEK SMALL LETTER BETA} "\x01'


def test_an_older_torch_file_is_read_too(tmp_path: Path, released: Adapter) -> None:
    groups = {"image_proj": {}, "ip_adapter": {}}
    for key, value in released.state_dict().items():
        groups[key.partition(".")[0]][key.partition(".")[2]] = value
    torch.save(groups, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_same_bits(checkpoint.load(tmp_path / "old.bin").state_dict(), released.state_dict())


@pytest.mark.parametrize("names", [("a.SAFETENSORS", "a.safetensors"), ("a.Bin", "a.bin")], ids=" is ".join)
def test_endings_in_capitals_mean_the_same(tmp_path: Path, released: Adapter, names: tuple[str, str]) -> None:
    for name in names:
        checkpoint.save(tmp_path / name, released)
    capitals, small = (tmp_path / name for name in names)
    assert capitals.read_bytes() == small.read_bytes()
    assert_same_bits(checkpoint.load(capitals).state_dict(), released.state_dict())


def test_what_is_loaded_makes_the_same_tokens(tmp_path: Path, any_adapter: Adapter, sources: dict[str, Tensor]) -> None:
    checkpoint.save(tmp_path / "a.safetensors", any_adapter)
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.image_proj(**sources), any_adapter.image_proj(**sources))
    assert loaded.config == any_adapter.config
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


# Metadata first, widths second.


class LateLinear(torch.nn.Linear):
    """As a host makes one that is to take little memory: without weights until some are loaded, in the file's order."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        torch.nn.Module.__init__(self)
        self.weight = self.bias = None

    def _load_from_state_dict(self, state: dict, prefix: str, *_: object) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            setattr(self, key.removeprefix(prefix), torch.nn.Parameter(state[key], requires_grad=False))


class LateLayers:
    Linear, LayerNorm = LateLinear, torch.nn.LayerNorm


@pytest.mark.parametrize("order", [list, sorted])
def test_a_hosts_layers_may_have_no_weights_before_they_are_loaded(
    tmp_path: Path, any_adapter: Adapter, order: type
) -> None:
    state = any_adapter.state_dict()
    file = tmp_path / "adapter.bin"
    checkpoint.save(file, any_adapter)
    metadata = checkpoint.read(file)[1]
    late = Adapter.from_state_dict({key: state[key] for key in order(state)}, metadata, LateLayers)
    assert list(late.state_dict()) == list(state)
    assert checkpoint.weights_sha256(late.state_dict()) == checkpoint.weights_sha256(state)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_metadata_is_read_back_first(tmp_path: Path, released: Adapter, suffix: str) -> None:
    released.config = replace(released.config, base=Base.SDXL, instruction_encoder=InstructionEncoder.CLIP_L)
    path = tmp_path / f"a{suffix}"
    checkpoint.save(path, released, tasks="style, face", steps="1000")
    config = checkpoint.load(path).config
    assert config.base is Base.SDXL and config.instruction_encoder is InstructionEncoder.CLIP_L
    assert checkpoint.read(path)[1] == {
        "format": "pt",
        "architecture": "ip-adapter-instruct",
        "projector": "released",
        "base": "sdxl",
        "instruction_encoder": "clip_l",
        "tasks": "style, face",
        "steps": "1000",
    }


@pytest.mark.parametrize("width, encoder", [(768, "clip_l"), (1024, "open_clip"), (24, "open_clip")])
def test_without_metadata_the_width_tells_the_encoder(tmp_path: Path, width: int, encoder: str) -> None:
    adapter = random_adapter(replace(RELEASED, instruction_width=width))
    path = released_bin(tmp_path / "a.bin", adapter.state_dict())
    assert checkpoint.load(path).config.instruction_encoder.value == encoder


@pytest.mark.parametrize("width, base", [(768, Base.SD15), (2048, Base.SDXL), (56, Base.OTHER)])
def test_without_metadata_the_token_width_tells_the_base(tmp_path: Path, width: int, base: Base) -> None:
    adapter = random_adapter(replace(RELEASED, output_width=width))
    assert checkpoint.load(released_bin(tmp_path / "a.bin", adapter.state_dict())).config.base is base


@pytest.mark.parametrize("key, word", [("base", "sd16"), ("instruction_encoder", "t5")])
def test_metadata_that_names_the_unknown_is_refused(tmp_path: Path, released: Adapter, key: str, word: str) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, released.state_dict(), {key: word})
    with pytest.raises(ValueError, match=rf"a\.safetensors .*metadata names '{word}'"):
        checkpoint.load(path)


def test_sizes_are_read_from_the_weights(any_config: AdapterConfig) -> None:
    state = random_adapter(any_config).state_dict()
    assert AdapterConfig.from_state_dict(state) == any_config


def test_a_plain_ip_adapter_plus_file_loads(tmp_path: Path) -> None:
    path = released_bin(tmp_path / "ip-adapter-plus_sd15.bin", random_adapter(PLUS).state_dict())
    config = checkpoint.load(path).config
    assert not config.follows_instructions and not config.reads_prompt
    assert checkpoint.describe(config)["projector"] == "ip-adapter-plus"


@pytest.mark.parametrize(
    "odd",
    [
        {"heads": 1, "width": 33, "depth": 1, "token_count": 1},
        {"layers": ((1, 64),), "image_width": 7},
        {"heads": 3, "width": 20, "image_ff_mult": 3, "instruction_ff_mult": 1},
    ],
)
def test_small_and_odd_sizes_load(tmp_path: Path, odd: dict) -> None:
    adapter = random_adapter(replace(RELEASED, **odd))
    loaded = checkpoint.load(released_bin(tmp_path / "a.bin", adapter.state_dict()))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, loaded.config.image_width, generator=generator)
    instruction, prompt = (torch.randn(1, 3, width, generator=generator) for width in (24, 32))
    expected = adapter.image_proj(image, instruction, prompt)
    assert torch.isfinite(expected).all()
    assert torch.equal(loaded.image_proj(image, instruction, prompt), expected)


# Strictly: every weight is used, and none is made up.

MISSING = [
    "image_proj.latents",
    "image_proj.proj_in.bias",
    "image_proj.norm_out.weight",
    "image_proj.layers.0.0.to_q.weight",
    "image_proj.layers.2.1.3.weight",
    "image_proj.prompt_layers.1.0.norm1.bias",
    "image_proj.new_input_layers.0.1.1.weight",
    "image_proj.proj_prompt_input.bias",
    "ip_adapter.3.to_v_ip.weight",
    "ip_adapter.3.to_k_ip.weight",
]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_weight_is_named(tmp_path: Path, released: Adapter, key: str) -> None:
    state = released.state_dict()
    del state[key]
    path = released_bin(tmp_path / "a.bin", state)
    wanted = "without a resampler" if key.endswith("latents") else f"{key}.*missing|missing.*{key}"
    with pytest.raises(ValueError, match=wanted):
        checkpoint.load(path)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_whole_lost_layer_is_named(tmp_path: Path, released: Adapter, lost: int) -> None:
    state = {key: value for key, value in released.state_dict().items() if f"ip_adapter.{lost}." not in key}
    with pytest.raises(ValueError, match=rf"ip_adapter\.{lost}\.to_k_ip\.weight is missing"):
        checkpoint.load(released_bin(tmp_path / "a.bin", state))


@pytest.mark.parametrize(
    "key", ["image_proj.layers.7.0.to_q.weight", "image_proj.surprise", "ip_adapter.one.to_k_ip.weight"]
)
def test_a_weight_too_many_is_refused(tmp_path: Path, released: Adapter, key: str) -> None:
    state = {**released.state_dict(), key: torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"a\.bin does not fit the released layout: .* (is|are) (missing|unexpected)"):
        checkpoint.load(released_bin(tmp_path / "a.bin", state))


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_proj.latents", torch.zeros(5, 48)),
        ("image_proj.proj_in.weight", torch.zeros(48)),
        ("image_proj.proj_prompt_input.weight", torch.zeros(())),
        ("image_proj.proj_out.weight", torch.zeros(3, 3)),
        ("image_proj.layers.1.0.to_kv.weight", torch.zeros(4, 48)),
        ("ip_adapter.1.to_k_ip.weight", torch.zeros(64)),
        ("ip_adapter.5.to_v_ip.weight", torch.zeros(64, 57)),
    ],
)
def test_a_weight_of_another_shape_is_named(tmp_path: Path, released: Adapter, key: str, value: Tensor) -> None:
    path = released_bin(tmp_path / "a.bin", {**released.state_dict(), key: value})
    with pytest.raises(ValueError, match=rf"{key} has \d dimensions|of another shape: {key}"):
        checkpoint.load(path)


# Whole or not at all.


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("before", [None, b"what was there before"], ids=["new file", "over a file"])
def test_a_failed_write_leaves_no_half_file(
    tmp_path: Path, released: Adapter, monkeypatch: pytest.MonkeyPatch, suffix: str, before: bytes | None
) -> None:
    path = tmp_path / f"a{suffix}"
    if before is not None:
        path.write_bytes(before)

    def disk_full(*arguments: object, **options: object) -> None:
        paths = (str(getattr(argument, "name", argument)) for argument in arguments)
        target = next(path for path in paths if path.startswith(str(tmp_path)))
        Path(target).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    monkeypatch.setattr(checkpoint.torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, released)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_others_may_read_what_was_written(tmp_path: Path, released: Adapter) -> None:
    checkpoint.save(tmp_path / "a.safetensors", released)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


# The command.


def run_convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ipadapter_instruct_core.convert", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=120)


def test_the_command_converts(tmp_path: Path, released: Adapter) -> None:
    source = released_bin(tmp_path / "in.bin", released.state_dict())
    done = run_convert(source, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert f"{len(released.state_dict())} tensors" in done.stderr
    assert_same_bits(checkpoint.load(tmp_path / "out.safetensors").state_dict(), released.state_dict())


def test_the_command_says_in_a_line_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "page.bin").write_bytes(b"<!DOCTYPE html><html></html>")
    done = run_convert(tmp_path / "page.bin", tmp_path / "out.safetensors")
    assert done.returncode == 1
    assert "web page" in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.bin"]


@pytest.mark.parametrize(
    "source, target, words",
    [
        ("absent.bin", "out.safetensors", "There is no file"),
        ("in.bin", "out.ckpt", "end it in .safetensors or .bin"),
        ("in.bin", "nowhere/out.bin", "There is no folder"),
    ],
)
def test_the_command_fails_without_a_trace(
    tmp_path: Path,
    released: Adapter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source: str,
    target: str,
    words: str,
) -> None:
    released_bin(tmp_path / "in.bin", released.state_dict())
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / source), str(tmp_path / target)])
    assert main() == 1
    assert words in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["in.bin"]


def test_the_command_asks_for_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "only-one"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
