"""What moves the weights, at which rate, and how far it moved each part of the adapter."""

import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from ipadapter_instruct_core.adapter import INSTRUCT
from torch import Tensor, nn
from training.train.settings import TrainConfig
from training.train.state import whole

# Parts of a `TrainedAdapter`, by how its parameters' names begin; the first that fits counts.
PARTS = {
    "instruct": tuple(f"adapter.{name}" for name in INSTRUCT),
    "projector": ("adapter.image_proj.",),
    "key_values": ("adapter.",),
}


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW as the settings want it, in one group that decays and one that does not.

    Raises:
        ValueError: ``adamw8bit`` without bitsandbytes or without a card.
    """
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": config.adam_betas, "eps": config.adam_eps}
    how: dict[str, Any] = {"fused": True} if config.fused_optimizer else {"foreach": True}
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    groups = _groups(trained, config.weight_decay)
    if config.optimizer == "adamw8bit":
        return _adamw8bit(device)(groups, **common)
    return torch.optim.AdamW(groups, **common, **how)


def _groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and the latents, which are learned tokens, do not."""
    decayed, kept = [], []
    for name, parameter in parameters:
        (decayed if parameter.ndim > 1 and not name.endswith(".latents") else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _adamw8bit(device: torch.device) -> Any:
    if device.type != "cuda":
        raise ValueError(f"The optimizer adamw8bit runs on a CUDA card, not on {device.type}; set it to adamw.")
    try:
        return import_module("bitsandbytes.optim").AdamW8bit
    except ImportError:
        raise ValueError(
            "The optimizer adamw8bit needs the package bitsandbytes; install it by `pip install bitsandbytes`, or set "
            "the optimizer to adamw."
        ) from None


def learning_rate_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    from diffusers.optimization import get_scheduler

    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)


def norms(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Euclidean norm of each part's tensors together, on their device; under FSDP all ranks call this.

    Args:
        tensors: gradients or updates by the parameters' names; None where a parameter has none.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            part = next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))
            parts.setdefault(part, []).append(tensor.detach())
    return {
        part: torch.stack([whole(norm) for norm in torch._foreach_norm(found)]).norm() for part, found in parts.items()
    }


def update(
    accelerator: Accelerator, optimizer: Any, parameters: Mapping[str, nn.Parameter], longest: float, told: bool
) -> dict[str, Tensor]:
    """Shorten the gradients to ``longest`` (0: any length) and take the optimiser's step; all ranks call this.

    Returns:
        Where they are ``told``, norms of the gradients as they were before and of the updates, by name and part.
    """
    length: Any = accelerator.clip_grad_norm_(parameters.values(), longest or math.inf) if longest or told else None
    if not told:
        optimizer.step()
        return {}
    shortened = (whole(length) / longest).clamp(min=1.0) if longest else 1.0
    gradients = norms({name: parameter.grad for name, parameter in parameters.items()})
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    updates = norms({name: parameter.detach() - before[name] for name, parameter in parameters.items()})
    found = {f"gradient_norm/{part}": norm * shortened for part, norm in gradients.items()}
    return found | {f"update_norm/{part}": norm for part, norm in updates.items()}
