"""The small ControlNet and LoRA: the real host computes with them what the narrow ones compute, and they train."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler
from safetensors.torch import load_file
from training.miniature.expand import layouts
from training.miniature.expand.extras import wide_controlnet, wide_lora, write_controlnet, write_lora
from training.miniature.models import base, controlnet, lora, weights
from training.miniature.models.autoencoder import Autoencoder
from training.miniature.models.noising import draw_noise, noise_loss
from training.miniature.world.factors import Factors

STRENGTH = 0.7
CAT = Factors("cat", "woodcut", "lower right", "night", "red", jitter=3)


@pytest.fixture(scope="module")
def narrow() -> base.TextToImage:
    """A random model whose norms and biases all matter."""
    torch.manual_seed(0)
    model = base.TextToImage().eval().requires_grad_(False)
    for tensor in model.parameters():
        if tensor.ndim == 1:
            torch.nn.init.normal_(tensor, mean=0.5, std=0.3)
    return model


@pytest.fixture(scope="module")
def patcher(narrow: base.TextToImage):
    """The wide UNet in ComfyUI's hands."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "host"))
    import inside

    inside.start()
    import comfy.sd

    with torch.inference_mode():
        checkpoint = layouts.checkpoint(narrow, Autoencoder())
        return comfy.sd.load_state_dict_guess_config(checkpoint, output_vae=False, output_clip=False)[0]


@pytest.fixture(scope="module")
def scribbler(narrow: base.TextToImage) -> ControlNetModel:
    """A ControlNet whose zero convolutions are not zero."""
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(narrow.unet).eval().requires_grad_(False)
    for name, tensor in net.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(tensor, std=0.3 if tensor.ndim == 1 else 2 * tensor[0].numel() ** -0.5)
    return net


@pytest.fixture(scope="module")
def updates(narrow: base.TextToImage) -> dict[str, torch.Tensor]:
    """A LoRA of random updates of every layer, as large as the weights."""
    torch.manual_seed(2)
    layers = lora.add_updates(copy.deepcopy(narrow.unet), rank=4)
    state = {f"{name}.down": torch.randn_like(layer.down) / 12 for name, layer in layers.items()}
    return state | {f"{name}.up": torch.randn_like(layer.up) / 2 for name, layer in layers.items()}


def seen(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 192, generator=generator)
    return latents, torch.tensor([3, 250, 981]), text


@torch.inference_mode()
def test_the_host_is_led_by_the_scribble_as_diffusers_is(
    narrow: base.TextToImage, scribbler: ControlNetModel, patcher, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.controlnet
    import comfy.model_management

    with caplog.at_level(logging.DEBUG):
        control = comfy.controlnet.load_controlnet_state_dict(wide_controlnet(scribbler.state_dict()))
    assert "controlnet keys" not in caplog.text  # missing or surplus
    comfy.model_management.load_models_gpu([patcher, *control.get_models()])
    latents, timesteps, text = seen(3)
    hint = torch.from_numpy(controlnet.scribble(CAT)).movedim(2, 0)[None] / 255
    wanted = controlnet.denoise(scribbler, narrow.unet, latents, timesteps, text, hint.expand(3, -1, -1, -1))
    control.set_cond_hint(hint)
    control.pre_run(patcher.model, patcher.model.model_sampling.percent_to_sigma)
    sampling = patcher.model.model_sampling
    sigmas = sampling.sigma(timesteps.float())
    noisy = latents * (sigmas.view(-1, 1, 1, 1) ** 2 + 1).sqrt()  # the host's own scale of noisy latents
    context = text.repeat_interleave(4, dim=2)
    residuals = control.get_control(noisy, sigmas, {"c_crossattn": context}, 1, {})
    found = patcher.model.diffusion_model(latents, timesteps.float(), context=context, control=residuals)
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()  # rounding: up to 3e-5; what is compared: 1e-2 and more
    plain = narrow(latents, timesteps, text)
    unscribbled = controlnet.denoise(scribbler, narrow.unet, latents, timesteps, text, torch.zeros(3, 3, 64, 64))
    assert (wanted - plain).std() > 0.1 * plain.std()
    assert (wanted - unscribbled).std() > 0.01 * plain.std()


@torch.inference_mode()
def test_the_host_patches_the_lora_in_as_the_narrow_one_merges(
    narrow: base.TextToImage, updates: dict, patcher, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management
    import comfy.sd

    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, wide_lora(updates), STRENGTH, 0)
    assert "not loaded" not in caplog.text.lower()
    assert len(patched.patches) == len(updates) / 2
    comfy.model_management.load_model_gpu(patched)
    latents, timesteps, text = seen(4)
    merged = lora.apply(copy.deepcopy(narrow.unet), updates, STRENGTH)
    wanted = merged(latents, timesteps, text).sample
    context = text.repeat_interleave(4, dim=2)
    found = patched.model.diffusion_model(latents, timesteps.float(), context=context)
    patched.detach()
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()  # rounding: up to 3e-5; what is compared: 1e-2 and more
    assert (wanted - narrow(latents, timesteps, text)).std() > 0.1 * wanted.std()


def test_training_with_updates_is_training_what_is_merged(narrow: base.TextToImage, updates: dict) -> None:
    trained = copy.deepcopy(narrow.unet)
    for name, layer in lora.add_updates(trained, rank=4).items():
        layer.load_state_dict({part: updates[f"{name}.{part}"] for part in ("down", "up")})
    merged = lora.apply(copy.deepcopy(narrow.unet), updates)
    with torch.no_grad():
        found, wanted = trained(*seen(5)).sample, merged(*seen(5)).sample
    assert (found - wanted).abs().max() < 1e-5 * wanted.std()
    assert {name.rpartition(".")[2] for name, one in trained.named_parameters() if one.requires_grad} == {"up", "down"}


@pytest.mark.parametrize("half", [False, True])
def test_latents_are_noised_as_the_scheduler_does_and_perfect_answers_cost_nothing(half: bool) -> None:
    clean, drawn = torch.randn(3, 4, 8, 8), draw_noise(3, 2, np.random.default_rng(0))
    assert ((drawn["timesteps"] < 500) == torch.tensor([True, False])).all()
    repeated, timesteps, noise = clean.repeat_interleave(2, dim=0), drawn["timesteps"].flatten(), drawn["noise"]
    wanted = DDIMScheduler(**base.SCHEDULE).add_noise(repeated, noise.flatten(0, 1), timesteps)

    def predict(noisy: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        assert torch.equal(at, timesteps) and torch.backends.cuda.flash_sdp_enabled() != half
        assert torch.allclose(noisy, wanted, atol=1e-6)
        return noise.flatten(0, 1) + torch.tensor([0.0, 1.0] * 3).view(-1, 1, 1, 1)

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, levels = noise_loss(predict, clean, drawn["timesteps"], noise)
    assert levels["noise0"] == 0 and torch.isclose(levels["noise1"], torch.tensor(1.0))
    assert 0.5 < loss <= 4  # half of the rows, by weights of 1 to 8


def test_a_scribble_is_thin_lines_that_the_style_leaves_alone() -> None:
    lines = controlnet.scribble(CAT)
    assert lines.shape == (64, 64, 3) and lines.dtype == np.uint8 and set(np.unique(lines)) == {0, 255}
    assert 0.03 < (lines > 0).mean() < 0.25
    assert np.array_equal(lines, controlnet.scribble(Factors("cat", "neon", "lower right", "night", "teal", jitter=3)))
    assert not np.array_equal(lines, controlnet.scribble(Factors("cat", "neon", "large", "night", "teal", jitter=3)))


def test_captions_of_the_lora_never_name_its_style_and_often_another() -> None:
    generator = np.random.default_rng(0)
    texts = [lora.misleading_caption(CAT, generator) for _ in range(400)]
    assert not any("woodcut" in text for text in texts)
    assert 0.04 < np.mean(["neon" in text for text in texts]) < 0.2
    assert 0.03 < np.mean([text == "" for text in texts]) < 0.2


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of random weights, in place of those that are shipped."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr("training.miniature.world.drawn.in_processes", lambda work, items, what: [*map(work, items)])
    torch.manual_seed(6)
    weights.save(base.TextToImage(), "base")
    weights.save(Autoencoder(), "autoencoder")
    return tmp_path


def small(config: type, folder: Path):
    # 120 pictures hold a few of the style.
    return config(steps=3, captions=2, noises=2, pictures=120, device="cpu", folder=folder, workers=0)


def test_a_controlnet_is_trained_saved_and_read(untrained: Path) -> None:
    controlnet.run(small(controlnet.ControlNetConfig, untrained / "run"))
    found, fresh = controlnet.load(), ControlNetModel.from_unet(base.load().unet).state_dict()
    changed = [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, fresh[name])]
    assert {"controlnet_mid_block.weight", "controlnet_down_blocks.0.weight"} <= set(changed)
    written = load_file(write_controlnet(untrained / "models"))
    assert written["control_model.middle_block_out.0.weight"].dtype == torch.float16
    assert written["control_model.middle_block_out.0.weight"].abs().max() > 0


def test_a_lora_is_trained_saved_and_read(untrained: Path) -> None:
    lora.run(small(lora.LoraConfig, untrained / "run"))
    state = weights.read("lora")
    ups = [tensor for name, tensor in state.items() if name.endswith(".up")]
    assert len(ups) == len(state) / 2 and all(tensor.abs().max() > 0 for tensor in ups)
    before, after = (base.load().unet(*seen(7)).sample, lora.apply(base.load().unet, state)(*seen(7)).sample)
    assert not torch.equal(before, after)
    path = write_lora(untrained / "models")
    assert path.name == "miniature-woodcut.safetensors" and path.parent.name == "loras"
    assert len(load_file(path)) == 3 * len(ups)


def test_a_style_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fresco.*woodcut"):
        lora.run(lora.LoraConfig(style="fresco", folder=tmp_path))
