"""The part that is trained, where it starts from, and its loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from ipadapter_instruct_core.adapter import INSTRUCT, Adapter
from ipadapter_instruct_core.checkpoint import load
from ipadapter_instruct_core.config import AdapterConfig, Base, Form, InstructionEncoder
from ipadapter_instruct_core.projector import NEW_LAYER_SIGMA
from torch import Tensor, nn
from torch.profiler import record_function
from training.frozen.fit import check_fit
from training.frozen.network import Sites, is_joint, predict, sites
from training.frozen.noise import noised

Projector = Literal["paper", "released", "ip-adapter-plus"]
# Widths and heads of the published adapters (IPAdapter+ and IPAdapter-Instruct), for a start from scratch.
SCRATCH = {
    Base.SD15: AdapterConfig(width=768, heads=12, output_width=768, base=Base.SD15),
    Base.SDXL: AdapterConfig(width=1280, heads=20, output_width=2048, base=Base.SDXL),
    Base.SD3: AdapterConfig(
        width=1280, heads=20, output_width=4096, base=Base.SD3, form=Form.JOINT, output_suffix="_big"
    ),
    Base.SD35: AdapterConfig(width=1280, heads=20, output_width=4096, base=Base.SD35, form=Form.IMAGE_STREAM),
}


class TrainedAdapter(nn.Module):
    """An adapter whose forward gives all that a frozen network reads of it.

    So this is all that DDP or FSDP have to wrap: the network stays outside. SD3's runs its attentions through the
    layers themselves, and is therefore called from in here.
    """

    def __init__(self, adapter: Adapter, embed: Callable[[Tensor], Tensor] = lambda tokens: tokens) -> None:
        """``embed`` as `network.embedding` gives it."""
        super().__init__()
        self.adapter, self.embed = adapter, embed
        if adapter.config.form is Form.JOINT:  # nobody reads what the last layer hands on: it gets no gradient
            adapter.layers[-1].proj_encoder_passthrough_ip.requires_grad_(False)

    def forward(
        self, image: Tensor, instruction: Tensor, prompt: Tensor, read: Callable[[Sites], Tensor] | None = None
    ) -> Sites | Tensor:
        """image [B, N, W], instruction and prompt [B, L, W] -> keys and values [B, T, width] of each layer,
        or what ``read`` makes of them."""
        with record_function("adapter"):
            found = sites(self.adapter, self.adapter.image_proj(image, instruction, prompt), embed=self.embed)
        return found if read is None else read(found)


def start_adapter(
    start: Path | None,
    projector: Projector,
    widths: Mapping[str, int],
    layers: Sequence[tuple[int, int]],
    kind: Base,
    instruction_encoder: InstructionEncoder,
    seed: int,
    network: nn.Module | None = None,
    sigma: float = NEW_LAYER_SIGMA,
) -> Adapter:
    """The adapter that training starts from.

    IPAdapter+ weights get new layers that leave them as they are at first (Sec. 3.5); instruct weights go on as they
    are; without a file, everything starts at random, but on SD3 and SD3.5 so that the adapter equals its base.

    Args:
        widths: of the features: ``image``, ``instruction``, ``prompt``, and ``text``, the UNet's context.
        layers: the base's attentions that layers add to, as `network.prepare` lists them.
        network: the base's, whose own keys and values the layers of SD3 and SD3.5 start from; not read on others.
        sigma: of the new layers' noise.

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
        adapter.image_proj.initialise_new_layers(generator, sigma)
        if config.form is not Form.CROSS:
            assert network is not None
            initialise_layers(adapter, network)
        return adapter
    adapter = load(start).float()
    check_fit(start.name, adapter.config, {**widths, "instruction": None, "prompt": None}, layers, kind)
    if adapter.config.follows_instructions:
        _check_encoder(start.name, adapter.config, instruction_encoder)
    elif instruction_width is not None:
        adapter = adapter.with_instruction(instruction_width, prompt_width, generator, sigma)
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


def train_instruct_alone(adapter: Adapter) -> None:
    """Only what reads the instruction, and the released projector's prompt, is to learn."""
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(name.startswith(INSTRUCT))


@torch.no_grad()
def initialise_layers(adapter: Adapter, network: Any) -> None:
    """Start the layers of SD3 or SD3.5 so that nothing is added, with keys that the base's own queries know."""
    start = _start_joint_layer if adapter.config.form is Form.JOINT else _start_image_stream_layer
    for number, layer in adapter.ip_adapter.items():
        start(layer, network.transformer_blocks[int(number)].attn, network.context_embedder)


def _start_joint_layer(layer: Any, attention: Any, embedder: nn.Linear) -> None:
    """As the authors' SD3 layers do: keys and values are the block's own, outputs are zero, and tokens are handed on as
    they are."""
    own = {
        layer.to_k_ip: attention.to_k,
        layer.to_v_ip: attention.to_v,
        layer.add_k_proj_ip: attention.add_k_proj,
        layer.add_v_proj_ip: attention.add_v_proj,
    }
    for ours, theirs in own.items():
        ours.weight.copy_(theirs.weight)
    nn.init.zeros_(layer.proj_ip.weight)
    nn.init.zeros_(layer.proj_encoder_hidden_states_ip.weight)
    nn.init.eye_(layer.proj_encoder_passthrough_ip.weight)


def _start_image_stream_layer(layer: Any, attention: Any, embedder: nn.Linear) -> None:
    """Keys are those that the block makes of text, embedding and norm included; values are zero."""
    layer.to_k_ip.weight.copy_(attention.add_k_proj.weight @ embedder.weight)
    layer.norm_k_ip.weight.copy_(attention.norm_added_k.weight)
    nn.init.zeros_(layer.to_v_ip.weight)


def losses(network: Any, adapter: nn.Module, schedule: Any, batch: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Loss of each sample, [B] (Sec. 3.5: as IPAdapter): of the predicted noise, or of v where the base predicts that,
    or on SD3 and SD3.5 of the velocity (flow matching, Esser et al. 2024).

    Args:
        network: frozen, prepared by `network.prepare`.
        adapter: a `TrainedAdapter`, wrapped or not.
        batch: ``latents``, ``noise`` [B, C, h, w], ``timestep`` [B], ``text``, ``image``, ``instruction``,
            ``prompt``, and beside SD1.5 ``added``, as `FrozenBase.added` gives it.
        dtype: the frozen network's precision.
    """
    mixed = noised(schedule, batch["latents"].float(), batch["noise"].float(), batch["timestep"])
    parameter = next(adapter.parameters()).dtype
    states = (batch[name].to(parameter) for name in ("image", "instruction", "prompt"))

    def read(image: Sites | None) -> Tensor:
        text = batch["text"].to(dtype)
        with record_function("network"):
            return predict(network, mixed.latents.to(dtype), mixed.time, text, image, batch.get("added"))

    prediction = adapter(*states, read=read) if is_joint(network) else read(adapter(*states))
    return (prediction.float() - mixed.target).pow(2).mean(dim=(1, 2, 3))
