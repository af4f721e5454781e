"""The OpenCLIP towers give the hidden states that an adapter reads, from every place a model can lie in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.encoders import CLIP_MEAN, CLIP_STD, OpenClip, crop_extremes, load_open_clip, preprocess
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 3, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}


@pytest.fixture(scope="module")
def model() -> OpenClip:
    torch.manual_seed(0)
    model = OpenClip(SMALL)
    for parameter in model.parameters():  # so that no norm and no bias is a constant
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def seen_by(module: torch.nn.Module, run: object) -> Tensor:
    """What a module returned while `run` was called."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    run()
    handle.remove()
    (output,) = outputs
    return output


def test_image_tokens_are_the_penultimate_blocks_output(model: OpenClip) -> None:
    pixels = model.preprocess(pictures(2, 3, 40, 30))
    block = model.clip.visual.transformer.resblocks[-2]
    expected = seen_by(block, lambda: model.clip.encode_image(pixels))
    tokens = model.image_tokens(pixels)
    assert tokens.shape == (2, 1 + (28 // 7) ** 2, 32)
    torch.testing.assert_close(tokens, expected)
    last = seen_by(model.clip.visual.transformer.resblocks[-1], lambda: model.clip.encode_image(pixels))
    assert not torch.allclose(tokens, last, atol=1e-3)


def test_instruction_tokens_are_the_final_norms_output(model: OpenClip) -> None:
    texts = ["use the style", "take the object, please"]
    expected = seen_by(model.clip.ln_final, lambda: model.clip.encode_text(model.tokenizer(texts)))
    tokens = model.instruction_tokens(texts)
    assert tokens.shape == (2, 20, 48)
    torch.testing.assert_close(tokens, expected)
    alone = model.instruction_tokens(texts[1:])
    torch.testing.assert_close(tokens[1:], alone, rtol=1e-4, atol=1e-5)


def test_brackets_are_read_literally(model: OpenClip) -> None:
    plain, bracketed = model.instruction_tokens(["the style", "(the style:1.3)"])
    assert not torch.allclose(plain, bracketed, atol=1e-3)


def test_what_does_not_fit_is_named(model: OpenClip) -> None:
    words = " ".join(f"word{i}" for i in range(30))
    assert model.cut_words("use the style") == ""
    cut = model.cut_words(words)
    assert cut and words.replace(" ", "").endswith(cut.replace(" ", ""))
    assert model.instruction_tokens([words]).shape == (1, 20, 48)


# Where a model can lie.


def assert_same_model(loaded: OpenClip, model: OpenClip) -> None:
    pixels = model.preprocess(pictures(1, 3, 28, 28))
    assert torch.equal(loaded.image_tokens(pixels), model.image_tokens(pixels))
    assert torch.equal(loaded.instruction_tokens(["use the face"]), model.instruction_tokens(["use the face"]))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("config_name", ["{stem}.json", "open_clip_config.json"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["open_clip's json", "model_cfg alone"])
def test_a_file_and_the_config_beside_it(
    tmp_path: Path, model: OpenClip, suffix: str, config_name: str, wrapped: bool
) -> None:
    path = tmp_path / f"small{suffix}"
    weights = model.clip.state_dict()
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    config = {"model_cfg": SMALL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}} if wrapped else SMALL
    (tmp_path / config_name.format(stem="small")).write_text(json.dumps(config))
    loaded = load_open_clip(str(path))
    assert_same_model(loaded, model)
    assert loaded.mean == ((0.5,) * 3 if wrapped else CLIP_MEAN) and loaded.std == (
        (0.25,) * 3 if wrapped else CLIP_STD
    )
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def test_a_folder(tmp_path: Path, model: OpenClip) -> None:
    save_file(model.clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    assert_same_model(load_open_clip(str(tmp_path)), model)


def test_a_config_that_is_handed_over(tmp_path: Path, model: OpenClip) -> None:
    save_file(model.clip.state_dict(), tmp_path / "small.safetensors")
    assert_same_model(load_open_clip(str(tmp_path / "small.safetensors"), SMALL), model)


def test_half_precision_files_are_computed_in_full(tmp_path: Path, model: OpenClip) -> None:
    save_file({k: v.half() for k, v in model.clip.state_dict().items()}, tmp_path / "small.safetensors")
    loaded = load_open_clip(str(tmp_path / "small.safetensors"), SMALL)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def refusal(path: Path, config: dict | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_open_clip(str(path), config)
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 330 and message.endswith("."), message
    return message


def test_a_config_of_another_size(tmp_path: Path, model: OpenClip) -> None:
    path = tmp_path / "small.safetensors"
    save_file(model.clip.state_dict(), path)
    wider = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "width": 60}}
    message = refusal(path, wider)
    assert "small.safetensors does not fit its configuration" in message and "named small.json" in message
    assert "size mismatch" not in message
    deeper = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "layers": 4}}
    assert "does not fit its configuration" in refusal(path, deeper)


@pytest.mark.parametrize(
    "config",
    [
        {"embed_dim": 24, "vision_cfg": {"timm_model_name": "vit_base"}, "text_cfg": SMALL["text_cfg"]},
        {"embed_dim": 24, "text_cfg": SMALL["text_cfg"]},
        {**SMALL, "text_cfg": {**SMALL["text_cfg"], "depth": 3}},
        {},
    ],
)
def test_a_config_of_another_kind(tmp_path: Path, model: OpenClip, config: dict) -> None:
    save_file(model.clip.state_dict(), tmp_path / "small.safetensors")
    message = refusal(tmp_path / "small.safetensors", config)
    assert "not that of a plain OpenCLIP model" in message and "open_clip_config.json" in message


def test_a_config_that_is_no_json(tmp_path: Path, model: OpenClip) -> None:
    save_file(model.clip.state_dict(), tmp_path / "small.safetensors")
    for content in ("<html>", "[1, 2]"):
        (tmp_path / "small.json").write_text(content)
        assert "small.json is not" in refusal(tmp_path / "small.safetensors")


def test_files_of_another_kind(tmp_path: Path) -> None:
    save_file({"vision_model.x": torch.zeros(2)}, tmp_path / "vision.safetensors")
    message = refusal(tmp_path / "vision.safetensors")
    assert "not a whole OpenCLIP model" in message and "open_clip_model.safetensors" in message
    (tmp_path / "page.bin").write_bytes(b"<html>")
    assert "web page" in refusal(tmp_path / "page.bin")
    (tmp_path / "empty").mkdir()
    assert "empty holds no weights" in refusal(tmp_path / "empty")


def test_weights_that_are_not_numbers(tmp_path: Path, model: OpenClip) -> None:
    weights = {key: value.clone() for key, value in model.clip.state_dict().items()}
    weights["visual.proj"][0, 0] = float("nan")
    save_file(weights, tmp_path / "small.safetensors")
    assert "not numbers, in visual.proj" in refusal(tmp_path / "small.safetensors", SMALL)


# Pictures of every size (against the host's own preprocessing: tests/host/test_files.py).


@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (5, 3), (224, 224), (223, 301), (640, 480), (3, 2000)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_picture_becomes_a_square(height: int, width: int, channels: int) -> None:
    out = preprocess(pictures(2, channels, height, width))
    assert out.shape == (2, 3, 224, 224) and torch.isfinite(out).all()
    back = out * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert float(back.min()) > -1e-5 and float(back.max()) < 1 + 1e-5
    torch.testing.assert_close(back * 255, (back * 255).round(), rtol=0, atol=1e-3)


def test_grey_is_repeated_and_alpha_left_out() -> None:
    rgba = pictures(1, 4, 50, 60)
    assert torch.equal(preprocess(rgba), preprocess(rgba[:, :3]))
    grey = rgba[:, :1]
    assert torch.equal(preprocess(grey), preprocess(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("height, width", [(1, 4000), (4000, 1)])
def test_a_very_long_picture_does_not_become_gigabytes(height: int, width: int) -> None:
    """Resized whole, it would have 224 × 896,000 pixels: 2.4 GB."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in (out,) if isinstance(t, Tensor))])
            return out

    with Watch():
        out = preprocess(pictures(1, 3, height, width))
    assert out.shape == (1, 3, 224, 224)
    assert largest < 2_000_000


def test_only_extreme_pictures_are_cut() -> None:
    ordinary = pictures(1, 3, 100, 400)
    assert crop_extremes(ordinary) is ordinary or torch.equal(crop_extremes(ordinary), ordinary)
    extreme = pictures(1, 3, 10, 101)
    assert torch.equal(crop_extremes(extreme), extreme[..., 30:70])
    assert torch.equal(crop_extremes(extreme.transpose(2, 3)), extreme[..., 30:70].transpose(2, 3))
