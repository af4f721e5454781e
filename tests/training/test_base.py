"""Base models: the shipped configurations, single files against folders, and every kind of wrong file."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.config import Base
from safetensors.torch import load_file, save_file
from single_file import autoencoder_state, clip_state, open_clip_state, save_single_file, unet_key, unet_state
from tiny_base import save_sd15, save_sdxl
from tools.tiny_shapes import FULL_UNET, clip_text_shapes, unet_shapes
from training.base import BASE_CONFIGS, FrozenBase, load_base
from training.base_files import _schedule
from training.conditioned_unet import cross_attentions
from training.trained import losses

KINDS = {"sd15": save_sd15, "sdxl": save_sdxl}


def model(kind: str, part: str, **changes: object) -> Any:
    """A part as the shipped configuration describes it, in full shape and without memory."""
    import diffusers
    import transformers

    config = {**json.loads((BASE_CONFIGS / kind / part / "config.json").read_text()), **changes}
    with torch.device("meta"):
        if part.startswith("text"):
            return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
        return getattr(diffusers, config["_class_name"]).from_config(config)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("kind", "part", "parameters", "tensors"),
    [
        ("sd15", "unet", 859_520_964, 686),
        ("sd15", "vae", 83_653_863, 248),
        ("sd15", "text_encoder", 123_060_480, 196),
        ("sdxl", "unet", 2_567_463_684, 1680),
        ("sdxl", "vae", 83_653_863, 248),
        ("sdxl", "text_encoder", 123_060_480, 196),
        ("sdxl", "text_encoder_2", 694_659_840, 517),
    ],
)
def test_shipped_configurations_are_of_the_public_models(kind: str, part: str, parameters: int, tensors: int) -> None:
    whole = model(kind, part)
    assert sum(parameter.numel() for parameter in whole.parameters()) == parameters
    assert len(whole.state_dict()) == tensors


def test_original_keys_agree_with_independent_tables() -> None:
    from open_clip import get_model_config
    from open_clip.transformer import TextTransformer

    assert shapes(unet_state(model("sd15", "unet", block_out_channels=[320] * 4))) == unet_shapes(FULL_UNET)
    words = shapes(clip_state(model("sd15", "text_encoder")))
    assert words.pop("text_model.embeddings.position_ids") == (1, 77)
    assert words == clip_text_shapes()
    big = get_model_config("ViT-bigG-14")
    with torch.device("meta"):
        tower = TextTransformer(**big["text_cfg"], output_dim=big["embed_dim"])
    assert shapes(open_clip_state(model("sdxl", "text_encoder_2"))) == shapes(tower.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_original_keys_become_the_configured_models(kind: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    unet, vae = model(kind, "unet"), model(kind, "vae")
    original = {f"model.diffusion_model.{key}": tensor for key, tensor in unet_state(unet).items()}
    assert shapes(convert_ldm_unet_checkpoint(original, unet.config)) == shapes(unet.state_dict())
    original = {f"first_stage_model.{key}": tensor for key, tensor in autoencoder_state(vae).items()}
    assert shapes(convert_ldm_vae_checkpoint(original, vae.config)) == shapes(vae.state_dict())


# The released adapters' numbers in ComfyUI's block names: (block, id), and the transformer's place in it.
COMFYUI = {
    "sd15": [
        *[("input", n, 0) for n in (1, 2, 4, 5, 7, 8)],
        *[("output", n, 0) for n in range(3, 12)],
        ("middle", 1, 0),
    ],
    "sdxl": [
        *[("input", n, place) for n in (4, 5) for place in range(2)],
        *[("input", n, place) for n in (7, 8) for place in range(10)],
        *[("output", n, place) for n in (0, 1, 2) for place in range(10)],
        *[("output", n, place) for n in (3, 4, 5) for place in range(2)],
        *[("middle", 1, place) for place in range(10)],
    ],
}
WIDTHS = {
    "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}


@pytest.mark.parametrize("kind", KINDS)
def test_cross_attentions_are_numbered_as_in_released_adapters(kind: str) -> None:
    unet = model(kind, "unet")
    found = cross_attentions(unet)
    assert found == list(zip(range(1, 2 * len(WIDTHS[kind]), 2), WIDTHS[kind], strict=True))
    names = [name for name in unet.attn_processors if ".attn2." in name]
    crossed = tuple("CrossAttn" in block for block in unet.config.up_block_types)
    keys = [unet_key(name, unet.config.layers_per_block, crossed) for name in names]
    places = [re.match(r"(\w+)_blocks?\.(\d+)(?:\.1)?\.transformer_blocks\.(\d+)\.", key).groups() for key in keys]
    assert [(block, int(n), int(place)) for block, n, place in places] == COMFYUI[kind]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``sd15`` and ``sdxl``, whose weights all differ, and each as single files of both precisions."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("bases")
    for kind, save in KINDS.items():
        pipe = DiffusionPipeline.from_pretrained(save(folder / kind))
        generator = torch.Generator().manual_seed(3)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            for parameter in part.parameters() if part is not None else ():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        pipe.save_pretrained(folder / kind)
        save_single_file(folder / f"{kind}.safetensors", pipe)
        save_single_file(folder / f"{kind}-half.safetensors", pipe, torch.float16)
        half = load_file(folder / f"{kind}-half.safetensors")
        full = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in half.items()}
        save_file(full, folder / f"{kind}-twin.safetensors")
    return folder


PROMPTS = ["A watercolour of two foxes, detailed!!", "", "a very long tale of " + "one more fox and " * 40]


@torch.inference_mode()
def outputs(base: FrozenBase) -> dict[str, torch.Tensor]:
    """What a base makes of fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    pixels = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    text = base.text_states(base.tokens(PROMPTS))
    mean, deviation = base.latent_distribution(pixels)
    added = {} if text.pooled is None else {"text_embeds": text.pooled, "time_ids": base.size_condition(64, 3)}
    times = torch.tensor([3, 500, 999])
    prediction = base.unet(latents, times, encoder_hidden_states=text.hidden, added_cond_kwargs=added).sample
    result = {"prediction": prediction, "mean": mean, "deviation": deviation, "decoded": base.decode(mean)}
    result |= {"hidden": text.hidden, "prompt": text.prompt}
    return result if text.pooled is None else {**result, "pooled": text.pooled}


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_equals_its_folder(bases: Path, kind: str) -> None:
    folder, file = load_base(bases / kind), load_base(bases / f"{kind}.safetensors", bases / kind)
    assert folder.kind is file.kind is Base(kind)
    assert folder.schedule.config == file.schedule.config
    expected, found = outputs(folder), outputs(file)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.std() > 1e-3, name
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_identities_hold_for_every_format_and_precision(bases: Path, kind: str) -> None:
    folder = load_base(bases / kind, with_unet=False)
    assert folder.unet is None
    expected = folder.identities()
    assert len(set(expected.values())) == {"sd15": 2, "sdxl": 3}[kind]
    for file in (kind, f"{kind}-half", f"{kind}-twin"):
        base = load_base(bases / f"{file}.safetensors", bases / kind, with_unet=False)
        assert base.unet is None and base.vae.dtype == torch.float32
        assert base.identities() == expected, file
    changed = next(folder.text_encoders[-1].parameters())
    changed.data[0, 0] += 0.01
    assert folder.identities() != expected


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_open_clips_with_each_encoders_padding(bases: Path, kind: str) -> None:
    from open_clip import tokenize

    found = load_base(bases / kind, with_unet=False).tokens(PROMPTS)
    expected = tokenize(PROMPTS)
    ends = expected.argmax(dim=1, keepdim=True)
    assert ends.flatten().tolist() == [9, 1, 76]
    after = torch.arange(77) > ends
    assert torch.equal(found[0], expected.masked_fill(after, 49407))
    assert all(torch.equal(numbers, expected) for numbers in found[1:])
    assert len(found) == {"sd15": 1, "sdxl": 2}[kind]


def test_text_states_are_diffusers_own(bases: Path) -> None:
    from diffusers import DiffusionPipeline

    prompts = ["a fox in the snow", ""]  # no "!", which its second tokenizer takes for padding
    for kind in KINDS:
        pipe = DiffusionPipeline.from_pretrained(bases / kind)
        base = load_base(bases / kind)
        states = base.text_states(base.tokens(prompts))
        encoded = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        torch.testing.assert_close(states.hidden, encoded[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(base.prompt_states(base.tokens(prompts)[0]), states.prompt, rtol=0, atol=0)
        if kind == "sdxl":
            torch.testing.assert_close(states.pooled, encoded[2], rtol=1e-6, atol=1e-6)
            numbers = pipe._get_add_time_ids((512, 512), (0, 0), (512, 512), torch.float32, 40)
            torch.testing.assert_close(base.size_condition(512, 3).float(), numbers.expand(3, 6))


def test_both_schedules_are_stable_diffusions() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for kind in KINDS:
        schedule = _schedule(BASE_CONFIGS / kind)
        np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)
        assert schedule.config.prediction_type == "epsilon"


class Answering(torch.nn.Module):
    """In a UNet's place: gives a set answer, and remembers what it was asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, latents: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        self.latents = latents
        return (self.answer,)


class NoAdapter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *_: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("marked_by", ["scheduler", "key"])
def test_a_base_that_predicts_v_is_trained_on_velocity(bases: Path, tmp_path: Path, marked_by: str) -> None:
    folder = shutil.copytree(bases / "sd15", tmp_path / "v")
    if marked_by == "scheduler":
        edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
        base = load_base(folder, with_unet=False)
    else:
        state = load_file(bases / "sd15.safetensors")
        save_file({**state, "v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
        base = load_base(tmp_path / "v.safetensors", folder, with_unet=False)
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.tensor(np.cumprod(1 - betas)[[100, 900]]).float().view(2, 1, 1, 1)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * x
    unet = Answering(velocity)
    states = dict.fromkeys(("text", "image", "instruction", "prompt"), torch.zeros(2, 1, 1))
    batch = {"latents": x, "noise": noise, "timestep": torch.tensor([100, 900]), **states}
    assert losses(unet, NoAdapter(), base.schedule, batch, torch.float32).max() < 1e-9
    torch.testing.assert_close(unet.latents, alphas.sqrt() * x + (1 - alphas).sqrt() * noise)
    unet.answer = noise
    off = (noise - velocity).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses(unet, NoAdapter(), base.schedule, batch, torch.float32), off)


def test_zero_terminal_noise_is_read_from_the_files_mark(bases: Path, tmp_path: Path) -> None:
    state = {**load_file(bases / "sdxl.safetensors"), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(state, tmp_path / "z.safetensors")
    schedule = load_base(tmp_path / "z.safetensors", bases / "sdxl", with_unet=False).schedule
    assert schedule.config.prediction_type == "v_prediction"
    assert (
        schedule.alphas_cumprod[-1]
        < 1e-6
        < 4e-3
        < load_base(bases / "sdxl", with_unet=False).schedule.alphas_cumprod[-1]
    )


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_folders_of_other_habits(bases: Path, tmp_path: Path) -> None:
    """Half precision under names of its own, older keys, no tokenizer, and CLIP's older end-of-text number."""
    folder = shutil.copytree(bases / "sdxl", tmp_path / "other")
    shutil.rmtree(folder / "tokenizer")
    words = weights_of(folder / "text_encoder")
    older = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(words).items()}
    save_file({**older, "text_model.embeddings.position_ids": torch.arange(77)[None]}, words, {"format": "pt"})
    for encoder in ("text_encoder", "text_encoder_2"):
        edit(folder / encoder / "config.json", eos_token_id=2)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        path = weights_of(folder / part)
        half = {key: t.half() if t.is_floating_point() else t for key, t in load_file(path).items()}
        path.unlink()
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    base, twin = load_base(folder), load_base(bases / "sdxl-half.safetensors", bases / "sdxl")
    assert base.identities() == twin.identities()
    found = outputs(base)
    for name, tensor in outputs(twin).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_nothing_is_asked_of_the_network(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    asked = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for kind in KINDS:
        load_base(bases / kind)
        load_base(bases / f"{kind}.safetensors", bases / kind)
        with pytest.raises(ValueError, match=f"base_configs/{kind}"):
            load_base(bases / f"{kind}.safetensors")
        with pytest.raises(ValueError, match="holds no model_index.json"):
            load_base(bases / f"{kind}.safetensors", Path("somebody/a-model"))
    assert asked == []
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 80))
    assert asked
