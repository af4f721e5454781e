"""The part that is trained, where it starts from, and its loss."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import AdapterConfig, Base, InstructionEncoder
from torch import Tensor, nn
from training.frozen.fit import check_fit
from training.frozen.unet import predict

Projector = Literal["paper", "released", "ip-adapter-plus"]
# Widths and heads of the published adapters (IPAdapter+ and IPAdapter-Instruct), for a start from scratch.
SCRATCH = {
    Base.SD15: AdapterConfig(width=768, heads=12, output_width=768, base=Base.SD15),
    Base.SDXL: AdapterConfig(width=1280, heads=20, output_width=2048, base=Base.SDXL),
}


class TrainedAdapter(nn.Module):
    """An adapter whose forward gives every cross-attention's keys and values.

    They are all that a UNet reads, so this is all that DDP or FSDP have to wrap: the frozen model stays outside.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, image: Tensor, instruction: Tensor, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """image [B, N, W], instruction [B, L, W], prompt [B, L, W] -> keys and values [B, T, width], in key order."""
        return self.adapter.key_values(self.adapter.image_proj(image, instruction, prompt))


def start_adapter(
    start: Path | None,
    projector: Projector,
    widths: Mapping[str, int],
    layers: Sequence[tuple[int, int]],
    kind: Base,
    instruction_encoder: InstructionEncoder,
    seed: int,
) -> Adapter:
    """The adapter that training starts from.

    IPAdapter+ weights get new layers that leave them as they are at first (Sec. 3.5); instruct weights go on as they
    are; without a file, everything starts at random.

    Args:
        widths: of the features: ``image``, ``instruction``, ``prompt``, and ``text``, the UNet's context.
        layers: the base's cross-attentions, as `conditioned_unet.cross_attentions` lists them.

    Raises:
        ValueError: the file does not fit the base, the features or the projector asked for.
    """
    torch.manual_seed(seed)  # a new linear layer's own initialisation takes no generator
    generator = torch.Generator().manual_seed(seed)
    prompt_width = widths["prompt"] if projector == "released" else None
    instruction_width = None if projector == "ip-adapter-plus" else widths["instruction"]
    if start is None:
        config = replace(
            SCRATCH[kind],
            image_width=widths["image"],
            output_width=widths["text"],
            instruction_width=instruction_width,
            prompt_width=prompt_width,
            instruction_encoder=instruction_encoder,
            layers=tuple(layers),
        )
        adapter = Adapter(config)
        adapter.image_proj.initialise_new_layers(generator)
        return adapter
    adapter = load(start).float()
    check_fit(start.name, adapter.config, {**widths, "instruction": None, "prompt": None}, layers)
    if adapter.config.follows_instructions:
        _check_encoder(start.name, adapter.config, instruction_encoder)
    elif instruction_width is not None:
        adapter = adapter.with_instruction(instruction_width, prompt_width, generator)
    if (adapter.config.instruction_width, adapter.config.prompt_width) != (instruction_width, prompt_width):
        raise ValueError(
            f"{start.name} has instructions {adapter.config.instruction_width} wide and prompts "
            f"{adapter.config.prompt_width} wide; projector {projector!r} with these features needs "
            f"{instruction_width} and {prompt_width}. Change `projector` or the instruction encoder."
        )
    adapter.config = replace(adapter.config, instruction_encoder=instruction_encoder, base=kind)
    adapter.image_proj.config = adapter.config
    return adapter.requires_grad_(True).train()


def _check_encoder(name: str, config: AdapterConfig, encoder: InstructionEncoder) -> None:
    if config.instruction_encoder is not encoder:
        raise ValueError(
            f"{name} was trained with instructions by {config.instruction_encoder.value}, these are by "
            f"{encoder.value}; encode them with the encoder that it was trained with."
        )


def losses(
    unet: nn.Module, adapter: nn.Module, schedule: Any, batch: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """Noise-prediction loss of each sample, [B] (Sec. 3.5: as IPAdapter; v where the base predicts v).

    Args:
        unet: frozen, prepared by `conditioned_unet.prepare_unet`.
        adapter: a `TrainedAdapter`, wrapped or not.
        batch: ``latents``, ``noise`` [B, 4, h, w], ``timestep`` [B], ``text``, ``image``, ``instruction``,
            ``prompt``, and on SDXL ``pooled`` and ``time_ids``.
        dtype: the frozen UNet's precision.
    """
    latents, noise, timesteps = batch["latents"].float(), batch["noise"].float(), batch["timestep"]
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(latents, noise, timesteps)
    parameter = next(adapter.parameters()).dtype
    states = (batch[name].to(parameter) for name in ("image", "instruction", "prompt"))
    key_values = adapter(*states)
    added = None
    if "pooled" in batch:
        added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"].to(dtype)}
    prediction = predict(unet, noisy.to(dtype), timesteps, batch["text"].to(dtype), key_values, added)
    return (prediction.float() - target).pow(2).mean(dim=(1, 2, 3))
