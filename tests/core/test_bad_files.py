"""Files that are no adapters, or damaged ones: one sentence or two that say what is wrong and what to do."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ipadapter_instruct_core import checkpoint
from safetensors.torch import save_file
from small_adapters import RELEASED, random_adapter
from tools.tiny.models import checkpoint as tiny_checkpoint
from tools.tiny.models import lora
from tools.tiny.shapes import MIN_UNET, Shapes, clip_text_shapes, clip_vision_shapes, controlnet_shapes

STACK_TRACE_WORDS = ("Traceback", "Error(", "size mismatch", "NoneType", "index", "tuple", "unpack", "invalid literal")
Write = Callable[[Path], Any]


def refusal(path: Path) -> str:
    """The message with which a file is refused, after a look at its manners."""
    with pytest.raises(ValueError) as caught:
        checkpoint.load(path)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert path.name in message, "the user must see which file is meant"
    assert "\n" not in message and 30 < len(message) < 330 and message.endswith((".", "'"))
    assert not [word for word in STACK_TRACE_WORDS if word in message], message
    return message


def shaped(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def adapter_state() -> dict[str, torch.Tensor]:
    return random_adapter(RELEASED).state_dict()


def groups(projector: dict[str, torch.Tensor], layers: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {"image_proj": projector, "ip_adapter": layers}


# Downloads gone wrong.

PAGES = [
    b"<!DOCTYPE html>\n<html><body>Please log in</body></html>",
    b"\n\n  <html>",
    b"\xef\xbb\xbf<!doctype html>",
    b"<?xml version='1.0'?><Error>AccessDenied</Error>",
]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("content", PAGES)
def test_a_web_page_saved_as_weights(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    message = refusal(path)
    assert "web page (HTML), not weights" in message and "download button" in message


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_an_answer_in_words_saved_as_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for content in (b"Entry not found", b'{"error":"Repository not found"}\n'):
        path.write_bytes(content)
        message = refusal(path)
        assert "is a text" in message and "not found" in message and "download it again" in message


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    message = refusal(path)
    assert "is empty" in message and "download it again" in message


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_git_lfs_pointer(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 352271353\n")
    message = refusal(path)
    assert "Git LFS pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize("kind", ["zip", "older torch", "safetensors"])
@pytest.mark.parametrize("keep", [3, 9, 20, 30, 100, 0.3, 0.9, 0.9999])
def test_a_file_cut_short(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.bin")
    if kind == "safetensors":
        save_file(adapter_state(), path)
    else:
        torch.save(adapter_state(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    message = refusal(path)
    assert "download it again" in message and "incomplete" in message


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_noise(tmp_path: Path, suffix: str, seed: int) -> None:
    path = tmp_path / f"a{suffix}"
    noise = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path.write_bytes(bytes(noise.tolist()))
    assert "download it again" in refusal(path)


def test_bytes_overwritten_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(adapter_state(), path)
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    refusal(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.bin", tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file .*; check its name and folder"):
            checkpoint.load(path)


# Code in a pickle is never run.


class Touch:
    """Unpickled by Python itself, this makes a file."""

    def __init__(self, witness: Path):
        self.witness = str(witness)

    def __reduce__(self) -> tuple:
        return (open, (self.witness, "w"))


CODE: dict[str, Callable[[Path, Touch], Any]] = {
    "torch.save": lambda path, code: torch.save({"image_proj": {}, "ip_adapter": {"x": code}}, path),
    "older torch.save": lambda path, code: torch.save({"a": code}, path, _use_new_zipfile_serialization=False),
    **{
        f"pickle protocol {protocol}": lambda path, code, protocol=protocol: path.write_bytes(
            pickle.dumps({"image_proj": code}, protocol=protocol)
        )
        for protocol in (0, 2, 4, 5)
    },
}


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, kind: str, suffix: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / f"a{suffix}"
    CODE[kind](path, Touch(witness))
    message = refusal(path)
    assert not witness.exists(), "the code ran"
    if suffix == ".bin" and kind != "pickle protocol 0":
        assert "holds code besides weights" in message and "safetensors version" in message
    if kind.startswith("pickle protocol"):
        pickle.loads(path.read_bytes()).clear()
        assert witness.exists(), "this file would have run its code, had it been let"


def test_a_list_in_a_pickle(tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "a.bin")
    assert "holds a list, not named weights" in refusal(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps([1, 2, 3]))
    refusal(tmp_path / "b.bin")
    torch.save({}, tmp_path / "c.bin")
    assert "not an adapter" in refusal(tmp_path / "c.bin")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "a.pt")
    assert "TorchScript program, not weights" in refusal(tmp_path / "a.pt")


# Sound files of another kind.

PEFT = {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 8)}
DIFFUSERS_LORA = {"unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": torch.zeros(4, 8)}
FOREIGN: dict[str, tuple[Callable[[], dict], str, str]] = {
    "a LoRA": (lambda: lora(seed=1), "is a LoRA, not an adapter", "LoRA loader"),
    "a PEFT LoRA": (lambda: PEFT, "is a LoRA", "LoRA loader"),
    "an older diffusers LoRA": (lambda: DIFFUSERS_LORA, "is a LoRA", "LoRA loader"),
    "a ControlNet": (lambda: shaped(controlnet_shapes(MIN_UNET)), "is a ControlNet", "Load ControlNet Model"),
    "a diffusers ControlNet": (
        lambda: {"controlnet_cond_embedding.conv_in.weight": torch.zeros(16, 3, 3, 3)},
        "is a ControlNet",
        "Load ControlNet Model",
    ),
    "a checkpoint": (lambda: tiny_checkpoint(MIN_UNET, 1), "is a whole checkpoint", "Load Checkpoint"),
    "a UNet": (lambda: {"input_blocks.0.0.weight": torch.zeros(2)}, "is a diffusion model", "Load Diffusion Model"),
    "Flux": (lambda: {"double_blocks.0.img_mod.lin.bias": torch.zeros(2)}, "is a diffusion model", "Load Diffusion"),
    "CLIP vision": (lambda: shaped(clip_vision_shapes(8, 2, 8)), "is a CLIP vision model", "Load CLIP Vision"),
    "CLIP text": (lambda: shaped(clip_text_shapes()), "is a text encoder", "Load CLIP"),
    "OpenCLIP": (lambda: {"visual.conv1.weight": torch.zeros(8, 3, 2, 2)}, "is an OpenCLIP model", "Load OpenCLIP"),
    "anything": (lambda: {"some.thing.weight": torch.zeros(2)}, "is not an adapter", "choose an IPAdapter-Instruct"),
    "training state": (
        lambda: {"state_dict": groups({"latents": torch.zeros(1, 2, 3)}, {}), "epoch": 3},
        "is not an adapter",
        "choose an IPAdapter-Instruct",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    weights, what, advice = FOREIGN[kind]
    torch.save(weights(), tmp_path / "a.bin")
    message = refusal(tmp_path / "a.bin")
    assert what in message and advice in message and "IPAdapter-Instruct" in message


def test_another_kind_is_named_in_safetensors_too(tmp_path: Path) -> None:
    save_file(lora(seed=1), tmp_path / "a.safetensors")
    assert "is a LoRA" in refusal(tmp_path / "a.safetensors")


def linear(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.zeros(4, 4) for name in names}


KEY_VALUES = linear("1.to_k_ip", "1.to_v_ip")
RELATIVES: dict[str, tuple[dict, str]] = {
    "FaceID": (
        groups(linear("proj.0", "proj.2", "norm"), {**KEY_VALUES, **linear("0.to_q_lora.down", "0.to_q_lora.up")}),
        "FaceID file, which reads face embeddings",
    ),
    "FaceID Plus": (
        groups(linear("proj.0", "perceiver_resampler.proj_in"), {**KEY_VALUES, **linear("0.to_q_lora.down")}),
        "FaceID file, which reads face embeddings",
    ),
    "FaceID portrait": (groups(linear("proj.0", "proj.2", "norm"), KEY_VALUES), "not a Plus version"),
    "plain IPAdapter": (groups(linear("proj", "norm"), KEY_VALUES), "without a resampler (not a Plus version)"),
}


@pytest.mark.parametrize("kind", RELATIVES)
def test_another_ip_adapter_is_named(tmp_path: Path, kind: str) -> None:
    weights, what = RELATIVES[kind]
    torch.save(weights, tmp_path / "a.bin")
    message = refusal(tmp_path / "a.bin")
    assert what in message and "choose an IPAdapter-Instruct file" in message


# Adapters with something wrong inside (missing and unexpected weights: test_checkpoint.py).


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("key", ["image_proj.latents", "ip_adapter.5.to_v_ip.weight"])
def test_values_that_are_not_numbers(tmp_path: Path, value: float, dtype: torch.dtype, key: str) -> None:
    state = {name: weight.to(dtype) for name, weight in adapter_state().items()}
    state[key].view(-1)[7] = value
    save_file(state, tmp_path / "a.safetensors")
    message = refusal(tmp_path / "a.safetensors")
    assert "not numbers" in message and key in message and "download it again" in message


def test_large_but_finite_values_are_let_through(tmp_path: Path) -> None:
    state = {key: weight.half() for key, weight in adapter_state().items()}
    state["image_proj.proj_in.weight"].fill_(60000.0)
    save_file(state, tmp_path / "a.safetensors")
    checkpoint.load(tmp_path / "a.safetensors")


def test_compressed_weights(tmp_path: Path) -> None:
    state = {**adapter_state(), "ip_adapter.1.to_k_ip.weight": torch.zeros(64, 56, dtype=torch.int8)}
    save_file(state, tmp_path / "a.safetensors")
    message = refusal(tmp_path / "a.safetensors")
    assert "compressed" in message and "int8" in message and "float16 or float32" in message


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    state = adapter_state()
    lost = [key for key in state if ".prompt_layers." in key][:-5]
    save_file({key: value for key, value in state.items() if key not in lost}, tmp_path / "a.safetensors")
    message = refusal(tmp_path / "a.safetensors")
    assert lost[0] in message and f"and {len(lost) - 3} more" in message and "download it again" in message


@pytest.mark.parametrize("name", ["a.ckpt", "a", "a.safetensor"])
def test_a_wrong_name_for_writing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="end it in .safetensors or .bin"):
        checkpoint.write(tmp_path / name, adapter_state(), {})
    assert not list(tmp_path.iterdir())


# Sizes that the file's own tensors cannot bear: refused at once, not after minutes or gigabytes.

ONE = torch.zeros(1, 1)
HUGE: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a layer's number": (
        {"image_proj.layers.1000000.0.to_q.weight": ONE},
        "the weight image_proj.layers.3.0.to_q.weight is missing",
    ),
    "an instruction layer's number": (
        {"image_proj.new_input_layers.1000000.0.to_q.weight": ONE},
        "the weight image_proj.layers.3.0.to_q.weight is missing",
    ),
    "a cross-attention's number": (
        {"ip_adapter.1000000001.to_k_ip.weight": ONE, "ip_adapter.999999999.to_v_ip.weight": ONE.clone()},
        "the weight ip_adapter.7.to_k_ip.weight is missing",
    ),
    "a layer's number, of 5000 digits": (
        {f"image_proj.layers.{'1' * 5000}.0.to_q.weight": ONE},
        "1 weights are unexpected",
    ),
    "a cross-attention's number, of 5000 digits": (
        {f"ip_adapter.{'1' * 5000}.to_k_ip.weight": ONE},
        "1 weights are unexpected",
    ),
    "a layer that widens nothing": ({"image_proj.layers.0.1.1.weight": torch.zeros(4, 0)}, "are of another shape"),
    "widths beyond any memory": (
        {
            "image_proj.latents": torch.zeros(1, 1, 3_000_000, dtype=torch.float16),
            "image_proj.layers.0.1.1.weight": torch.zeros(3_000_000, 1, dtype=torch.float16),
        },
        "its weights name sizes that no adapter has",
    ),
}


@pytest.mark.parametrize("kind", HUGE)
def test_sizes_that_the_file_cannot_bear(tmp_path: Path, kind: str) -> None:
    weights, words = HUGE[kind]
    save_file({**adapter_state(), **weights}, tmp_path / "a.safetensors")
    begun = time.process_time()
    with limited_memory(4 << 30):
        message = refusal(tmp_path / "a.safetensors")
    assert words in message and "download it again" in message
    assert time.process_time() - begun < 3


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """Fail a test that takes more than ``room`` bytes, rather than the machine. Only Linux can tell."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
