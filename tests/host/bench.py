"""A bench for the host inside the test's process: tiny real models, and one evaluation of a guider in numbers.

Pictures are told apart by adapter tokens drawn at random, so no CLIP vision is needed and a case takes
milliseconds. `Bench.predict` is the oracle: what the model says of one text with one set of tokens, through
the plainest path there is (one prompt, one row, tokens forced on it).
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import inside
import torch
from tools.tiny.models import TINY_NAMES, sd3_checkpoint
from torch import Tensor

pack = inside.start()

import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402

application = importlib.import_module(f"{inside.PACK}.nodes.host.application")
host_apply = importlib.import_module(f"{inside.PACK}.nodes.host.apply")
host_memory = importlib.import_module(f"{inside.PACK}.nodes.host.memory")
run_module = importlib.import_module(f"{inside.PACK}.nodes.host.run")
sampling = importlib.import_module(f"{inside.PACK}.nodes.host.sampling")
sites = importlib.import_module(f"{inside.PACK}.nodes.host.sites")
slots = importlib.import_module(f"{inside.PACK}.nodes.host.slots")
guidance = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.guidance")
core_adapter = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.adapter")
core_config = importlib.import_module(f"{inside.PACK}.ipadapter_instruct_core.config")
Application, ThreeWay, Chain = application.Application, application.ThreeWay, application.Chain
Row = guidance.Row

CFG = 5.0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, count: int = 1, width: int = 768) -> dict[Any, Tensor]:
    """Adapter tokens of four rows, each unlike the others."""
    return {row: random(count, 16, width, seed=100 * seed + i) for i, row in enumerate(Row)}


class Bench:
    """A tiny checkpoint with its text encoder and an adapter that fits, in the host's own classes."""

    channels = 4
    sigma = 3.0  # at which it is looked at by default

    def noisy(self, x: Tensor, sigma: float) -> Tensor:
        """A latent of a deviation of one as the model gets it."""
        return x * (1 + sigma**2) ** 0.5

    def __init__(self, models: Path, checkpoint: str, adapter: str, dtype: torch.dtype | None = None) -> None:
        """``dtype`` is the UNet's; by default the host decides."""
        self.model, self.clip, self.vae = comfy.sd.load_checkpoint_guess_config(
            str(models / "checkpoints" / checkpoint),
            output_vae=True,
            output_clip=True,
            model_options={"dtype": dtype} if dtype is not None else {},
        )[:3]
        self.adapter = host_memory.load_adapter(str(models / "ipadapter_instruct" / adapter), adapter)
        self.positive, self.negative = self.text("a cat"), self.text("blurry")
        self.empty = self.text("")

    def text(self, prompt: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def application(self, seed: int = 1, **settings: Any) -> Any:
        drawn = tokens(seed, width=self.adapter.config.output_width)
        return Application(**({"adapter": self.adapter, "tokens": drawn, "weight": 1.0} | settings))

    def apply(self, *applications: Any, model: Any = None) -> Any:
        model = model or self.model
        for each in applications:
            model = host_apply.apply(model, each)
        return model

    def cfg_guider(
        self, model: Any, cfg: float = CFG, positive: list | None = None, negative: list | None = None
    ) -> Any:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive or self.positive, negative or self.negative)
        guider.set_cfg(cfg)
        return guider

    def denoised(self, guider: Any, x: Tensor | None = None, sigma: float | None = None, calls: int = 1) -> Tensor:
        """What a guider says of one latent at one noise level: the denoised latent, through a whole sampling run."""
        x = random(1, self.channels, 8, 8) if x is None else x
        level = self.sigma if sigma is None else sigma
        seen: list[Tensor] = []

        def one_step(
            model: Any, noise: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any
        ) -> Tensor:
            for _ in range(calls):
                seen.append(model(self.noisy(x.to(noise), level), sigmas[:1].expand(len(x)), **extra_args))
            return noise

        # As many noise levels as latents (at least two): all that 0.3.75's context windows can tell apart.
        sigmas = torch.tensor([level] * max(len(x) - 1, 1) + [0.0])
        noise = torch.zeros_like(x)
        guider.sample(noise, noise, comfy.samplers.KSAMPLER(one_step), sigmas, disable_pbar=True, seed=0)
        return seen[-1]

    def cfg(self, model: Any, cfg: float = CFG, **kwargs: Any) -> Tensor:
        lists = {k: kwargs.pop(k) for k in ("positive", "negative") if k in kwargs}
        return self.denoised(self.cfg_guider(model, cfg, **lists), **kwargs)

    def predict(self, text: list, rows: dict[Any, Any] | None = None, model: Any = None, **kwargs: Any) -> Tensor:
        """The oracle: one text, and for each application the row whose tokens it is to see ({application: row})."""
        model = model or self.model
        for each, row in (rows or {}).items():
            model = host_apply.apply(model, replace(each, tokens=dict.fromkeys(Row, each.tokens[row]), three_way=None))
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": text})
        return self.denoised(guider, **kwargs)

    def three_way(self, each: Any, cfg: float, scales: Any, **kwargs: Any) -> Tensor:
        """The formula of FACTS, spelled out, of four separate predictions."""
        full = self.predict(self.positive, {each: Row.FULL}, **kwargs)
        everything = self.predict(self.negative, {each: Row.EVERYTHING}, **kwargs)
        image = self.predict(self.negative, {each: Row.IMAGE}, **kwargs)
        uncond = self.predict(self.negative, {each: Row.UNCOND}, **kwargs)
        return (
            uncond
            + scales.instruct_scale * (full - everything)
            + cfg * (everything - image)
            + scales.image_scale * (image - uncond)
        )


class Sd3Bench(Bench):
    """A flow: what the model gets is the latent with its noise, of a deviation of one at every level. Of SD3, or of
    SD3.5, whose queries and keys are ``normed``."""

    channels = 16
    sigma = 0.7
    normed = False

    def state(self) -> dict[str, Tensor]:
        """The transformer's weights, under the host's names."""
        state = sd3_checkpoint(13, self.normed)
        return {k.removeprefix("model.diffusion_model."): v for k, v in state.items() if "diffusion_model" in k}

    def loaded(self, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
        """A MODEL of other weights."""
        return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})

    def noisy(self, x: Tensor, sigma: float) -> Tensor:
        return x


def sd3_of(models: Path) -> Sd3Bench:
    """SD3 of four blocks, with two joint attentions that the adapter adds to."""
    names = ("sd3_medium_incl_clips_t5xxlfp8.safetensors", "ip-adapter-instruct-sd3.bin")
    return Sd3Bench(models, *(TINY_NAMES[name] for name in names), torch.float32)


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to rounding: rows in one batch are summed in another order than alone."""
    difference = float((a - b).abs().max() / b.abs().max())
    assert torch.isfinite(a).all()
    assert difference <= tolerance, f"relative difference {difference:.2e}"


def assert_differs(a: Tensor, b: Tensor, least: float = 1e-3) -> None:
    difference = float((a - b).abs().max() / b.abs().max())
    assert difference > least, f"relative difference only {difference:.2e}"


def counted_rows(model: Any) -> tuple[Any, list[int]]:
    """The model, and how many rows its network is asked for from now on; nothing on the MODEL shows it."""
    counts: list[int] = []
    model.model.diffusion_model.register_forward_pre_hook(lambda network, inputs: counts.append(len(inputs[0])))
    return model, counts


def simple_guidance(bench: Bench, each: Any, cfg: float = CFG, **kwargs: Any) -> torch.Tensor:
    full = bench.predict(bench.positive, {each: Row.FULL}, **kwargs)
    uncond = bench.predict(bench.negative, {each: Row.UNCOND}, **kwargs)
    return uncond + cfg * (full - uncond)
