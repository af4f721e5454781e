"""Base models: single files against folders, what is read of them, and that nothing is downloaded."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.config import Base
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from tiny_base import NoAdapter, save_sd15, save_sdxl
from training.frozen.base import FrozenBase, load_base
from training.train.adapter import losses

KINDS = {"sd15": save_sd15, "sdxl": save_sdxl}


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
    prediction = base.network(latents, times, encoder_hidden_states=text.hidden, added_cond_kwargs=added).sample
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
    folder = load_base(bases / kind, with_network=False)
    assert folder.network is None
    expected = folder.identities()
    assert len(set(expected.values())) == {"sd15": 2, "sdxl": 3}[kind]
    for file in (kind, f"{kind}-half", f"{kind}-twin"):
        base = load_base(bases / f"{file}.safetensors", bases / kind, with_network=False)
        assert base.network is None and base.vae.dtype == torch.float32
        assert base.identities() == expected, file
    changed = next(folder.text_encoders[-1].parameters())
    changed.data[0, 0] += 0.01
    assert folder.identities() != expected


def test_pictures_are_decoded_one_by_one(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder is what takes most memory of all where pictures are large."""
    base, sizes = load_base(bases / "sd15", with_network=False), []
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        whole = (base.vae.decode(latents / base.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        decode = base.vae.decode
        monkeypatch.setattr(base.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
        torch.testing.assert_close(base.decode(latents), whole)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_open_clips_with_each_encoders_padding(bases: Path, kind: str) -> None:
    from open_clip import tokenize

    found = load_base(bases / kind, with_network=False).tokens(PROMPTS)
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


class Answering(torch.nn.Module):
    """In a UNet's place: gives a set answer, and remembers what it was asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, latents: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        self.latents = latents
        return (self.answer,)


@pytest.mark.parametrize("marked_by", ["scheduler", "key"])
def test_a_base_that_predicts_v_is_trained_on_velocity(bases: Path, tmp_path: Path, marked_by: str) -> None:
    folder = shutil.copytree(bases / "sd15", tmp_path / "v")
    if marked_by == "scheduler":
        edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
        base = load_base(folder, with_network=False)
    else:
        state = load_file(bases / "sd15.safetensors")
        save_file({**state, "v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
        base = load_base(tmp_path / "v.safetensors", folder, with_network=False)
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
    schedule = load_base(tmp_path / "z.safetensors", bases / "sdxl", with_network=False).schedule
    assert schedule.config.prediction_type == "v_prediction"
    assert (
        schedule.alphas_cumprod[-1]
        < 1e-6
        < 4e-3
        < load_base(bases / "sdxl", with_network=False).schedule.alphas_cumprod[-1]
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
