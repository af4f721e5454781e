"""The optimiser reaches the new layers, decays what it should, and the log says how far it moved each part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.config import AdapterConfig, InstructionEncoder
from ipadapter_instruct_core.tasks import Task
from safetensors.torch import load_file
from torch import Tensor
from training.datasets.shards import Tally
from training.features.draws import Draw, Draws, Dropout, Dropped
from training.features.stored import FeatureSource
from training.frozen.base import load_base
from training.frozen.unet import prepare_unet
from training.train import checkpoints
from training.train.adapter import TrainedAdapter, losses, start_adapter
from training.train.batches import Drawn, collate
from training.train.data import state_widths
from training.train.optimizer import PARTS, make_optimizer
from training.train.settings import TrainConfig
from training.train.state import OPTIMIZER

from runs import train, weights

CPU, OPEN_CLIP = torch.device("cpu"), InstructionEncoder.OPEN_CLIP
NO_DROPOUT = {"text": 0, "words": 0, "image": 0, "all": 0}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def config_of(**changes: object) -> TrainConfig:
    return TrainConfig(base="base", out="out", features="features", **changes)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter(AdapterConfig(
        image_width=24, width=64, heads=1, depth=2, token_count=4, output_width=32, instruction_width=16,
        prompt_width=8, layers=((1, 32), (3, 64)),
    ))  # fmt: skip


# What the paper is about: that the instruction reaches the tokens


class Given(torch.nn.Module):
    """Keys and values as they are, so that a loss says its gradients by them."""

    def __init__(self, key_values: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList(part.detach() for pair in key_values for part in pair)

    def forward(self, *_: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.parts[::2], self.parts[1::2], strict=True))


def test_the_new_layers_open_at_the_papers_rate(small_world: Path) -> None:
    """Sixty steps at 1e-6 on one batch, from the shipped IPAdapter+, with our eps and with AdamW's usual one.

    At this rate the base's gradients by keys and values stay what they are, so it is asked for them once. They are
    scaled so that the new layers' first gradients are 4e-9, under the usual eps: four samples' own are larger, and what
    SD1.5's are nobody knows.
    """
    base = load_base(small_world / "diffusers")
    layers = prepare_unet(base.network)
    source = FeatureSource(small_world / "features", "train", Tally(0.0), 1.0)
    draws = Draws(0, source.by_task, dict.fromkeys(source.by_task, 1.0), Dropout(**NO_DROPOUT))
    drawn = Drawn(source, draws)
    batch = collate([drawn[1, position] for position in range(4)])
    states = [batch[name].float() for name in ("image", "instruction", "prompt")]
    phrases = [source.instructions[task][0].float().expand_as(states[1]) for task in ("style", "composition")]
    changes = {}
    for eps in (TrainConfig.model_fields["adam_eps"].default, 1e-8):
        start = small_world / "adapter-plain.safetensors"
        adapter = start_adapter(start, "paper", state_widths(source, None), layers, base.kind, OPEN_CLIP, seed=0)
        model = TrainedAdapter(adapter)
        given = Given(model(*states))
        losses(base.network, given, base.schedule, batch, torch.float32).mean().backward()
        gradients = [part.grad for part in given.parts]
        torch.autograd.backward([part for pair in model(*states) for part in pair], gradients)
        first = adapter.image_proj.new_input_layers[0][0].to_out.weight.grad.pow(2).mean().sqrt()
        gradients = [gradient * (4e-9 / first) for gradient in gradients]
        model.zero_grad()
        optimizer = make_optimizer(config_of(learning_rate=1e-6, adam_eps=eps), model, CPU)
        for _ in range(60):
            parts = [part for pair in model(*states) for part in pair]
            torch.autograd.backward(parts, gradients)
            optimizer.step()
            optimizer.zero_grad()
        with torch.inference_mode():
            style, layout = (adapter.image_proj(states[0], phrase, states[2]) for phrase in phrases)
        changes[eps] = float((style - layout).norm() / style.norm())
    chosen, usual = changes.values()
    assert usual > 1e-6, "nothing was learned, but for rounding"
    assert chosen >= 3 * usual, f"{chosen:.2e} against {usual:.2e}"


# Which weights decay


def test_matrices_decay_and_norms_biases_and_latents_do_not(adapter: Adapter) -> None:
    """By a step without gradients, in which nothing but decay can move a weight."""
    model = TrainedAdapter(adapter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(config_of(learning_rate=0.1, weight_decay=0.5), model, CPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    stays = {name for name in before if name.rpartition(".")[0] in norms or name.endswith((".bias", ".latents"))}
    assert len(norms) >= 2 * 2 * 3 + 1 and len(stays) > 2 * len(norms)
    for name, parameter in model.named_parameters():
        expected = before[name] if name in stays else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected)


def test_the_settings_are_the_optimisers(adapter: Adapter) -> None:
    optimizer = make_optimizer(config_of(adam_eps=1e-12, adam_betas=(0.8, 0.95)), TrainedAdapter(adapter), CPU)
    assert {(group["eps"], group["betas"]) for group in optimizer.param_groups} == {(1e-12, (0.8, 0.95))}
    assert {group["lr"] for group in optimizer.param_groups} == {1e-6}


@pytest.mark.parametrize(("device", "why"), [("cpu", "runs on a CUDA card, not on cpu"), ("cuda", "pip install bits")])
def test_an_optimiser_that_cannot_run_is_refused(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch, device: str, why: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)  # as where it is not installed
    with pytest.raises(ValueError, match=why):
        make_optimizer(config_of(optimizer="adamw8bit"), TrainedAdapter(adapter), torch.device(device))


# Runs from before there were two groups


def test_an_older_run_goes_on_with_the_settings_groups(workshop: Path, features: Path, tmp_path: Path) -> None:
    whole = train(workshop, tmp_path / "whole", steps=8)
    out = tmp_path / "older"
    train(workshop, out, steps=4)
    path = checkpoints.newest(out / "checkpoints") / OPTIMIZER
    kept = torch.load(path, weights_only=True)
    groups = kept["param_groups"]
    assert len(groups) == 2
    kept["param_groups"] = [{**groups[0], "eps": 1e-8, "params": [name for g in groups for name in g["params"]]}]
    torch.save(kept, path)
    hashes = path.with_name(checkpoints.HASHES)
    hashes.write_text(json.dumps(json.loads(hashes.read_text()) | {OPTIMIZER: checkpoints.sha256(path)}))
    found = train(workshop, out, steps=8)
    assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


# What the log says


def part_of(name: str) -> str:
    """Of a weight in the files' names."""
    if name.startswith("ip_adapter."):
        return "key_values"
    return "instruct" if "new_input" in name else "projector"


def test_the_log_has_the_norms_of_gradients_and_updates(workshop: Path, features: Path, tmp_path: Path) -> None:
    """Before clipping; the updates from the checkpoints, the gradients from the same run unclipped."""
    found = {}
    for longest in (0.0, 1e-3):
        out = tmp_path / str(longest)
        train(workshop, out, steps=2, log_every=1, checkpoint_every=1, max_grad_norm=longest)
        found[longest] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        first, second = (load_file(path / "adapter.safetensors") for path in sorted((out / "checkpoints").iterdir()))
        for part in PARTS:
            moved = [(second[name] - tensor).norm() for name, tensor in first.items() if part_of(name) == part]
            assert moved and found[longest][1][f"update_norm/{part}"] == pytest.approx(float(torch.stack(moved).norm()))
    for part in PARTS:
        free, clipped = (lines[0][f"gradient_norm/{part}"] for lines in found.values())
        assert 0 < clipped == pytest.approx(free, rel=1e-4)
    total = math.sqrt(sum(found[0.0][0][f"gradient_norm/{part}"] ** 2 for part in PARTS))
    assert total > 1e-3, "nothing was clipped"


def test_validation_says_whether_it_listens(workshop: Path, features: Path, tmp_path: Path) -> None:
    """Not at all at the start, where the new layers are silent; later as much as the tokens change by themselves."""
    lines = {}
    for rate, name in ((1e-12, "silent"), (1e-2, "trained")):
        out = tmp_path / name
        train(workshop, out, steps=6, learning_rate=rate, validation={"every": 6, "samples": 2, "pictures": 0})
        lines[name] = json.loads((out / "validation.jsonl").read_text())
    assert all(abs(lines["silent"][task]["listens_tokens"]) < 1e-5 for task in ("style", "object"))
    adapter = Adapter.from_state_dict(weights(tmp_path / "trained"))
    source = FeatureSource(features, "validation", Tally(0.0), 1.0)
    own, other = [], []
    for place in source.by_task[Task.STYLE][:2]:
        for task, tokens in ((Task.STYLE, own), (Task.OBJECT, other)):  # the one after style that the data hold
            item = source.item(Draw(Task.STYLE, place, 0.0, Dropped.NOTHING, 0, 0))
            states = source.instructions[task.value][0]
            with torch.inference_mode():
                tokens.append(adapter.image_proj(item["image"][None].float(), states[None].float(), None))
    own, other = torch.cat(own), torch.cat(other)
    expected = float((other - own).norm() / own.norm())
    assert expected > 1e-4 and lines["trained"]["style"]["listens_tokens"] == pytest.approx(expected, rel=1e-4)
    assert lines["trained"]["style"]["listens_loss"] != 0
