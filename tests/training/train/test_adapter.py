"""Where training starts from, and its loss, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load, save
from ipadapter_instruct_core.config import AdapterConfig, Base, InstructionEncoder
from tiny_base import OPEN_CLIP, WIDTH
from torch import Tensor
from training.train import adapter as trained
from training.train.adapter import losses, start_adapter

WIDTHS = {"image": OPEN_CLIP["vision_cfg"]["width"], "instruction": WIDTH, "prompt": WIDTH, "text": WIDTH}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


def begin(path: Path | None, projector: str, seed: int = 0, **changes: object) -> Adapter:
    layers = load(path).config.layers if path else [(1, 32), (3, 32)]
    arguments = {"start": path, "projector": projector, "widths": WIDTHS, "layers": layers, "kind": Base.SD15}
    encoder = InstructionEncoder.CLIP_L
    return start_adapter(**arguments | {"instruction_encoder": encoder, "seed": seed} | changes)


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 77, WIDTHS[name], generator=generator) for name in ("image", "instruction", "prompt"))


@pytest.mark.parametrize("projector", ["paper", "released", "ip-adapter-plus"])
def test_at_first_it_is_ip_adapter_plus_exactly(workshop: Path, projector: str) -> None:
    plain = load(workshop / "start.safetensors")
    adapter = begin(workshop / "start.safetensors", projector)
    image, instruction, prompt = states()
    with torch.no_grad():
        expected = plain.image_proj(image)
        for other in (instruction, torch.zeros_like(instruction), instruction * 50):
            assert torch.equal(adapter.image_proj(image, other, prompt), expected)
        for found, known in zip(adapter.key_values(expected), plain.key_values(expected), strict=True):
            assert torch.equal(found[0], known[0]) and torch.equal(found[1], known[1])
    new = {name.split(".")[1] for name in adapter.state_dict()} - {name.split(".")[1] for name in plain.state_dict()}
    added = {"paper": {"proj_new_input", "new_input_layers"}, "ip-adapter-plus": set()}
    assert new == added.get(projector, added["paper"] | {"proj_prompt_input", "prompt_layers"})
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_instruct_weights_go_on_as_they_are(workshop: Path, tmp_path: Path) -> None:
    before = begin(workshop / "start.safetensors", "released")
    for parameter in before.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save(tmp_path / "instruct.safetensors", before)
    found = begin(tmp_path / "instruct.safetensors", "released").state_dict()
    assert largest_difference(found, before.state_dict()) == 0
    with pytest.raises(ValueError, match="needs 32 and None. Change `projector` or the instruction encoder"):
        begin(tmp_path / "instruct.safetensors", "paper")
    with pytest.raises(ValueError, match="instruct.safetensors has instructions 32 wide and prompts 32 wide; "):
        begin(tmp_path / "instruct.safetensors", "ip-adapter-plus")


def test_a_start_from_scratch_has_the_published_sizes() -> None:
    """Of the released SD1.5 adapter: 88.05 M parameters, 16 cross-attentions; SDXL's tokens."""
    # Down, up and in the middle: 2 + 3 of 320 and of 640, 2 + 3 + 1 of 1280.
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    layers = tuple((2 * n + 1, width) for n, width in enumerate(widths))
    with torch.device("meta"):
        adapter = Adapter(replace(trained.SCRATCH[Base.SD15], layers=layers))
        large = Adapter(trained.SCRATCH[Base.SDXL]).image_proj
    assert round(sum(parameter.numel() for parameter in adapter.parameters()) / 1e6, 2) == 88.05
    assert large.latents.shape == (1, 16, 1280) and large.norm_out.weight.shape == (2048,)


def test_a_start_from_scratch_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small = AdapterConfig(width=64, heads=1, depth=1, token_count=4, output_width=WIDTH)
    monkeypatch.setitem(trained.SCRATCH, Base.SD15, small)
    first = begin(None, "released").state_dict()
    torch.manual_seed(99)
    assert largest_difference(begin(None, "released").state_dict(), first) == 0
    assert largest_difference(begin(None, "released", seed=1).state_dict(), first) > 0.1
    assert first["image_proj.proj_in.weight"].shape == (64, WIDTHS["image"])
    assert first["ip_adapter.3.to_k_ip.weight"].shape == (32, WIDTH)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_noise(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: what the UNet is given, and the mean square of what it misses, a sample each."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False
    )
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    generator = torch.Generator().manual_seed(0)
    latents, noise, guess = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 500, 999])
    given = {}
    monkeypatch.setattr(trained, "predict", lambda unet, noisy, *rest: given.update(noisy=noisy, rest=rest) or guess)
    batch = {name: torch.zeros(3, 5, 4) for name in ("image", "instruction", "prompt", "text")}
    adapter = torch.nn.Linear(1, 1)
    adapter.forward = lambda *states: "keys and values"
    batch |= {"latents": latents, "noise": noise, "timestep": timesteps}
    found = losses(None, adapter, schedule, batch, torch.float32)
    signal, spread = (part[timesteps].sqrt().view(3, 1, 1, 1) for part in (kept, 1 - kept))
    torch.testing.assert_close(given["noisy"], signal * latents + spread * noise)
    assert torch.equal(given["rest"][0], timesteps) and given["rest"][2] == "keys and values"
    target = noise if kind == "epsilon" else signal * noise - spread * latents
    torch.testing.assert_close(found, ((guess - target) ** 2).flatten(1).mean(1))
