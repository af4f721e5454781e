"""Layers of SD3 and SD3.5 on the frozen transformer: what they start as, what they learn first, and from which loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ipadapter_instruct_core.checkpoint import load, save
from ipadapter_instruct_core.config import Base, InstructionEncoder
from tiny_base import OPEN_CLIP, NoAdapter
from tools.tiny.diffusers_models import SD35, T5_WIDTH, WIDTH, save_sd3, save_sd3_start
from training.frozen.base import FrozenBase, load_base
from training.frozen.network import embedding, prepare
from training.train import adapter as trained
from training.train.adapter import TrainedAdapter, losses, start_adapter

KINDS = {"sd3": {}, "sd35": SD35}
WIDTHS = {"image": OPEN_CLIP["vision_cfg"]["width"], "instruction": WIDTH, "prompt": WIDTH, "text": T5_WIDTH}
FIRST = {"sd3": {"proj_ip", "proj_encoder_hidden_states_ip"}, "sd35": {"to_v_ip"}}  # what is zero at the start
DEAD = {"sd3": {"adapter.ip_adapter.2.proj_encoder_passthrough_ip.weight"}, "sd35": set()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_sd3(folder / name, **settings) for name, settings in KINDS.items()}


@pytest.fixture(scope="module", params=list(KINDS))
def base(request: pytest.FixtureRequest, folders: dict[str, Path]) -> FrozenBase:
    loaded = load_base(folders[request.param])
    assert loaded.kind.value == request.param
    return loaded


def start(base: FrozenBase, file: Path | None = None) -> TrainedAdapter:
    layers = prepare(base.network)
    assert [number for number, _ in layers] == [0, 2]
    small = replace(trained.SCRATCH[base.kind], width=64, heads=1, depth=1, token_count=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trained.SCRATCH, base.kind, small)
        adapter = start_adapter(
            file, "released", WIDTHS, layers, base.kind, InstructionEncoder.CLIP_L, seed=0, network=base.network
        )
    return TrainedAdapter(adapter, embedding(base.network))


def batch_of(base: FrozenBase) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **dict.fromkeys(("latents", "noise"), (2, 16, 8, 8)),
        "text": (2, 154, T5_WIDTH),
        "image": (2, 17, WIDTHS["image"]),
        **dict.fromkeys(("instruction", "prompt"), (2, 77, WIDTH)),
        "pooled": (2, 2 * WIDTH),
    }
    batch = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    added = base.added(batch.pop("pooled"), 64, torch.float32)
    return {**batch, "timestep": torch.tensor([10, 700]), "added": added}


def test_the_text_is_encoded_as_by_diffusers(folders: dict[str, Path], base: FrozenBase) -> None:
    """CLIP-L, CLIP-G and T5 of 77 tokens, and the pooled vectors; the projector reads CLIP-L's last normed states."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folders[base.kind.value], local_files_only=True)
    prompts = ["a red teapot, on a table", ""]
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(prompts, None, None, max_sequence_length=77)
        states = base.text_states(base.tokens(prompts))
    assert states.hidden.shape == (2, 77 + 77, T5_WIDTH)
    torch.testing.assert_close(states.hidden, hidden)
    torch.testing.assert_close(states.pooled, pooled)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(states.prompt, pipe.text_encoder(tokens).last_hidden_state)


def test_the_loss_is_flow_matching(folders: dict[str, Path], base: FrozenBase) -> None:
    """On diffusers' plain transformer, with the shares of noise worked out here."""
    from diffusers import SD3Transformer2DModel

    plain = SD3Transformer2DModel.from_pretrained(folders[base.kind.value] / "transformer", local_files_only=True)
    batch = batch_of(base)
    unshifted = 1 - batch["timestep"].double() / 1000
    share = (3 * unshifted / (1 + 2 * unshifted)).float()
    mix = share[:, None, None, None]
    noisy = (1 - mix) * batch["latents"] + mix * batch["noise"]
    with torch.no_grad():
        velocity = plain(noisy, batch["text"], batch["added"]["pooled_projections"], 1000 * share).sample
        expected = (velocity - (batch["noise"] - batch["latents"])).pow(2).mean(dim=(1, 2, 3))
        at_the_start = losses(base.network, start(base), base.schedule, batch, torch.float32)
        found = losses(base.network, NoAdapter(), base.schedule, batch, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(at_the_start, found), "an adapter that has learned nothing adds something"


def gradients(base: FrozenBase, model: TrainedAdapter, batch: dict) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    losses(base.network, model, base.schedule, batch, torch.float32).mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_first_what_is_zero_learns_and_then_all_that_is_read(base: FrozenBase) -> None:
    model, batch, kind = start(base), batch_of(base), base.kind.value
    first = gradients(base, model, batch)
    moved = {name for name, gradient in first.items() if gradient is not None and gradient.abs().max() > 0}
    assert {name.split(".")[-2] for name in moved} == FIRST[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in moved:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    second = gradients(base, model, batch)
    still = {name for name, gradient in second.items() if gradient is None or gradient.abs().max() == 0}
    assert {name for name in still if name.startswith("adapter.ip_adapter")} == DEAD[kind]
    assert second["adapter.image_proj.latents"].abs().max() > 0
    checkpointed = replace(base, network=copy.deepcopy(base.network))
    checkpointed.network.enable_gradient_checkpointing()
    checkpointed.network.train()
    for name, gradient in gradients(checkpointed, model, batch).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, second[name], rtol=1e-5, atol=1e-8)


def test_keys_are_at_first_those_of_text(folders: dict[str, Path]) -> None:
    """SD3.5's: what the block's own text attention makes of the same tokens, but for the text's biases."""
    base = load_base(folders["sd35"])
    model, tokens = start(base), torch.randn(1, 4, T5_WIDTH)
    embedder, attention = base.network.context_embedder, base.network.transformer_blocks[2].attn
    with torch.no_grad():
        keys, values = model.adapter.layers[1](tokens)
        of_text = (tokens @ embedder.weight.T) @ attention.add_k_proj.weight.T
        torch.testing.assert_close(keys, attention.norm_added_k(of_text), rtol=1e-4, atol=1e-5)
    assert not values.any()


@pytest.mark.parametrize("other", list(KINDS))
def test_a_start_of_the_other_family_is_refused(folders: dict[str, Path], tmp_path: Path, other: str) -> None:
    """Of blocks as wide, as SD3.5 medium's and SD3's are."""
    file = save_sd3_start(tmp_path / "start.safetensors", folders[other])
    base = load_base(folders[next(name for name in KINDS if name != other)])
    adapter = load(file)
    layers = tuple(prepare(base.network))
    wide = trained.Adapter(replace(adapter.config, layers=layers))
    save(file, wide)
    with pytest.raises(ValueError) as caught:
        start(base, file)
    labels = {"sd3": "SD3", "sd35": "SD3.5"}
    assert str(caught.value) == (
        f"start.safetensors is for another base: it is an adapter for {labels[other]}, the base is "
        f"{Base(base.kind).label}."
    )
