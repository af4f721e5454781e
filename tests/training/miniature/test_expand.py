"""The miniature in SD1.5's sizes computes what the narrow models compute, in the real host and in diffusers."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training.miniature.expand import layouts, write
from training.miniature.models import base
from training.miniature.models.autoencoder import Autoencoder, fold

TEXT = "a red cat in the snow, woodcut"


@pytest.fixture(scope="module")
def narrow() -> tuple[base.TextToImage, Autoencoder]:
    """Random models whose norms and biases all matter."""
    torch.manual_seed(0)
    model, coder = base.TextToImage().eval(), Autoencoder().eval()
    for tensor in [*model.parameters(), *coder.parameters()]:
        if tensor.ndim == 1:
            torch.nn.init.normal_(tensor, mean=0.5, std=0.3)
    return model.requires_grad_(False), coder.requires_grad_(False)


@pytest.fixture(scope="module")
def host(narrow: tuple[base.TextToImage, Autoencoder]) -> Iterator[tuple]:
    """The expanded checkpoint as ComfyUI's own loader takes it: model, CLIP, VAE."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "host"))
    import inside

    inside.start()
    import comfy.sd

    with torch.inference_mode():
        yield comfy.sd.load_state_dict_guess_config(layouts.checkpoint(*narrow))[:3]


def test_the_host_takes_it_as_sd15_and_denoises_as_the_narrow_unet(narrow: tuple, host: tuple) -> None:
    import comfy.model_management
    from comfy.supported_models import SD15

    patcher = host[0]
    assert isinstance(patcher.model.model_config, SD15)
    comfy.model_management.load_model_gpu(patcher)
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 192, generator=generator)
    timesteps = torch.tensor([3, 250, 981])
    wanted = narrow[0](latents, timesteps, text)
    found = patcher.model.diffusion_model(latents, timesteps.float(), context=text.repeat_interleave(4, dim=2))
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4


def test_the_host_reads_a_prompt_as_the_narrow_text_encoder(narrow: tuple, host: tuple) -> None:
    clip = host[1]
    conditioning = clip.encode_from_tokens(clip.tokenize(TEXT))
    wanted = narrow[0].read([TEXT])
    assert conditioning.shape == (1, 77, 768)
    # The host keeps text encoders in half precision.
    assert (conditioning[..., ::4] - wanted).abs().max() < 5e-3 < wanted.std()
    assert torch.equal(conditioning[..., ::4], conditioning[..., 3::4])


def test_the_host_codes_pictures_as_the_narrow_autoencoder(narrow: tuple, host: tuple) -> None:
    vae, coder = host[2], narrow[1]
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    latents = vae.encode(image)
    wanted = coder.encode(image.movedim(3, 1))
    assert (latents * layouts.LATENT_SCALE - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)
    decoded = coder.decode(wanted).clamp(0, 1)
    assert (vae.decode(latents).movedim(3, 1) - decoded).abs().max() < 1e-4


def test_the_diffusers_folder_holds_the_same(narrow: tuple, tmp_path: Path) -> None:
    from training.frozen.base_files import read_folder

    parts = read_folder(write.write_folder(tmp_path / "diffusers", *narrow), with_network=True)
    settings = json.loads((tmp_path / "diffusers" / "vae" / "config.json").read_text())
    known = inspect.signature(type(parts.vae).__init__).parameters
    assert {name for name in settings if name[0] != "_"} <= {*known}  # of others diffusers warns at each load
    model, coder = narrow
    tokens = base.tokenize([TEXT])
    text = parts.text_encoders[0](tokens).last_hidden_state
    assert (text - model.read([TEXT])).abs().max() < 1e-5
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    text = text.expand(2, -1, -1)
    assert (parts.network(latents, timesteps, text).sample - model(latents, timesteps, text)).abs().max() < 1e-5
    image = torch.rand(1, 3, 64, 64)
    found = parts.vae.encode(2 * image - 1).latents
    assert (found - coder.encode(image)).abs().max() < 1e-5 * found.abs().max().clamp(min=1)
    assert ((parts.vae.decode(found).sample + 1) / 2 - coder.decode(found)).abs().max() < 1e-4
    assert parts.vae.config.scaling_factor == 1


def test_batch_norms_draw_into_the_convolutions_before_them() -> None:
    torch.manual_seed(3)
    trained = Autoencoder(normed=True).eval()
    for module in trained.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    plain, image = fold(trained), torch.rand(2, 3, 64, 64)
    latents = trained.encode(image)
    assert latents.std() > 0.1
    assert (plain.encode(image) - latents).abs().max() < 1e-4
    assert (plain.decode(latents) - trained.decode(latents)).abs().max() < 1e-4


def test_an_adapter_widens_as_its_unet_does() -> None:
    """Keys and values of repeated channels from repeated tokens are the narrow ones, repeated."""
    generator = torch.Generator().manual_seed(4)
    tokens, weight = torch.randn(2, 16, 192, generator=generator), torch.randn(160, 192, generator=generator)
    wide = layouts.wide_adapter({"ip_adapter.1.to_k_ip.weight": weight, "image_proj.proj_in.bias": torch.ones(7)})
    found = tokens.repeat_interleave(4, dim=2) @ wide["ip_adapter.1.to_k_ip.weight"].T
    assert torch.allclose(found, (tokens @ weight.T).repeat_interleave(2, dim=2), atol=1e-4)
    assert wide["image_proj.proj_in.bias"].shape == (7,)
