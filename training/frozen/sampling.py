"""Pictures from a frozen base and an adapter: the rows of guidance, combined by the core's formulas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.guidance import Row, combine, simple_coefficients, three_way_coefficients
from ipadapter_instruct_core.tasks import GuidanceMode, Task, defaults
from PIL import Image
from torch import Tensor
from training.frozen.base import FrozenBase
from training.frozen.network import Sites, predict, sites
from training.frozen.noise import follows_flow
from training.frozen.transformer import Site


@dataclass(frozen=True)
class Conditioning:
    """One row of guidance for a batch of pictures.

    Attributes:
        text: the UNet's context [B, L, W].
        image: keys and values, on SD3 with their layers, or None for the bare base model.
        pooled: SDXL's or SD3's pooled vector [B, W].
    """

    text: Tensor
    image: Sites | None
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """How pictures are sampled; the scales are those of `ipadapter_instruct_core.guidance`."""

    steps: int = 30
    text_scale: float = 5.0
    weight: float = 0.8
    guidance: GuidanceMode = GuidanceMode.SIMPLE
    instruct_scale: float = 2.0
    image_scale: float = 1.0

    @classmethod
    def of_task(
        cls,
        task: Task,
        base: Any,
        steps: int,
        text_scale: float | None = None,
        weight: float | None = None,
        simple: bool = False,
    ) -> "Settings":
        """The task's reference settings; ``weight`` in place of its own strength, ``simple`` in place of its guidance.

        Weights that follow no instructions need ``simple``. At weight 0 nothing but the text's scale counts.
        """
        own = defaults(task, base)
        strength = own.weight if weight is None else weight
        guidance = GuidanceMode.SIMPLE if simple or strength == 0 else own.guidance
        return cls(
            steps,
            own.text_scale if text_scale is None else text_scale,
            strength,
            guidance,
            own.instruct_scale,
            own.image_scale,
        )

    def coefficients(self) -> dict[Row, float]:
        """Factor of each row that counts."""
        three_way = self.guidance is GuidanceMode.THREE_WAY
        rows = (
            three_way_coefficients(self.text_scale, self.instruct_scale, self.image_scale)
            if three_way
            else simple_coefficients(self.text_scale)
        )
        return {row: factor for row, factor in rows.items() if factor != 0.0}


def conditionings(
    adapter: Adapter,
    features: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    settings: Settings,
    embed: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> dict[Row, Conditioning]:
    """The rows that the settings ask for, each made as `ipadapter_instruct_core.guidance` says.

    Args:
        features: ``text``, ``image``, ``instruction``, ``prompt`` (by default ``text``), beside SD1.5 ``pooled``;
            each with a batch.
        rows: of dropped conditions, without a batch, as `Encoders.rows` gives them. The negative prompt is empty.
        embed: how the base embeds tokens, as `network.embedding` gives it.
    """
    batch = features["image"].shape[0]
    empty = {name: states.expand(batch, *states.shape) for name, states in rows.items()}
    prompt = features.get("prompt", features["text"])
    empty_prompt = empty.get("empty_prompt", empty["empty_text"])
    sources = {
        Row.FULL: (features["image"], features["instruction"], prompt),
        Row.EVERYTHING: (features["image"], empty["everything_instruction"], prompt),
        Row.IMAGE: (features["image"], empty["empty_instruction"], empty_prompt),
        Row.UNCOND: (empty["zero_image"], empty["empty_instruction"], empty_prompt),
    }
    result = {}
    for row in settings.coefficients():
        tokens = adapter.image_proj(*(states.to(adapter.image_proj.latents.dtype) for states in sources[row]))
        image = sites(adapter, tokens, settings.weight, embed)
        text = features["text"] if row is Row.FULL else empty["empty_text"]
        # The middle rows keep the positive pooled vector, as in the reference code.
        pooled = empty.get("empty_pooled") if row is Row.UNCOND else features.get("pooled")
        result[row] = Conditioning(text, image, pooled)
    return result


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """White noise [B, C, h, w], each picture's from its own seed, so that a batch's cut changes nothing."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def sample(
    base: FrozenBase,
    conditions: Mapping[Row, Conditioning],
    coefficients: Mapping[Row, float],
    noise: Tensor,
    steps: int,
    controlnet: tuple[Any, Tensor, float] | None = None,
) -> Tensor:
    """Denoise with DPM-Solver++(2M), on SD3 with Euler, the rows of a step in one batch.

    Args:
        conditions: a row each of ``coefficients``.
        noise: [B, C, h, w] with a deviation of one.
        controlnet: the network, its hint [B, 3, H, W] in 0-1, and its strength.

    Returns:
        Scaled latents [B, C, h, w].
    """
    rows = list(coefficients)
    device, dtype, batch = base.device, next(base.network.parameters()).dtype, noise.shape[0]
    scheduler = _solver(base.schedule)
    scheduler.set_timesteps(steps, device=device)
    text = torch.cat([conditions[row].text for row in rows]).to(device, dtype)
    image = _stack_sites([conditions[row].image for row in rows])
    pooled = [states for row in rows if (states := conditions[row].pooled) is not None]
    added = base.added(torch.cat(pooled) if pooled else None, noise.shape[-1] * 8, dtype)
    latents = noise.to(device)  # whose deviation is one with either solver
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents] * len(rows)).to(dtype)
        times = timestep.expand(len(rows) * batch)
        residuals = None
        if controlnet is not None:
            network, hint, strength = controlnet
            down, middle = network(
                inputs,
                times,
                encoder_hidden_states=text,
                controlnet_cond=torch.cat([hint.to(device, dtype)] * len(rows)),
                conditioning_scale=strength,
                added_cond_kwargs=added,
                return_dict=False,
            )
            residuals = (down, middle)
        parts = predict(base.network, inputs, times, text, image, added, residuals).float().chunk(len(rows))
        prediction = combine(dict(zip(rows, parts, strict=True)), coefficients)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def _solver(schedule: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if follows_flow(schedule):
        return FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
    return DPMSolverMultistepScheduler.from_config(schedule.config, algorithm_type="dpmsolver++")


def _stack_sites(rows: Sequence[Sites | None]) -> Sites | None:
    """Rows' keys and values one under another; a layer without them in any row has none."""
    if rows[0] is None:
        return None
    return [_stack(layer) for layer in zip(*rows, strict=True)]


def _stack(layer: Sequence[Any]) -> Any:
    first = layer[0]
    if first is None:
        return None
    if isinstance(first, Site):
        return first._replace(keys=torch.cat([s.keys for s in layer]), values=torch.cat([s.values for s in layer]))
    return torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer])


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in 0-1 -> pictures."""
    arrays = (pixels.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
