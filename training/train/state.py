"""The part of a run that a checkpoint holds: weights, their average, the optimiser; the same for any kind of ranks."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import save as save_adapter
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

ADAPTER = "adapter.safetensors"
AVERAGE = "average.safetensors"
OPTIMIZER = "optimizer.pt"
PREFIX = "adapter."  # of a `TrainedAdapter`'s parameters


class RunState:
    """Weights are gathered to the main process, so that a run may go on with another number of processes."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, decay: float) -> None:
        self.accelerator, self.model, self.decay = accelerator, model, decay
        self.optimizer = optimizer.optimizer  # inside accelerate's wrapper
        self.parameters = dict(accelerator.unwrap_model(model).named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()} if decay else {}

    def average(self) -> None:
        """Move the averages towards the weights, after a step."""
        if self.averages:
            torch._foreach_lerp_(
                list(self.averages.values()), [p.detach() for p in self.parameters.values()], 1 - self.decay
            )

    def weights(self, averaged: bool) -> dict[str, Tensor]:
        """Whole weights in the released layout; all ranks call this. ``averaged`` asks for the averages, if kept."""
        chosen = self.averages if averaged and self.averages else self.parameters
        return {name.removeprefix(PREFIX): whole(tensor.detach()) for name, tensor in chosen.items()}

    def write(self, folder: Path) -> None:
        """Write everything into a folder of the main process; all ranks call this. Raises what `adapter` raises."""
        self.accelerator.wait_for_everyone()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        _, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        sets = {ADAPTER: self.weights(averaged=False)}
        if self.averages:
            sets[AVERAGE] = self.weights(averaged=True)
        if self.accelerator.is_main_process:
            for name, state in sets.items():
                save_adapter(folder / name, self.adapter(state))
            torch.save(optimizer, folder / OPTIMIZER)
        self.accelerator.wait_for_everyone()

    def adapter(self, state: dict[str, Tensor]) -> Adapter:
        """The adapter that whole weights, as from `weights`, are of. Raises ValueError where one is no number."""
        bad = next((key for key, tensor in state.items() if not tensor.isfinite().all()), None)
        if bad:
            raise ValueError(f"The weight {bad} is no longer a number; lower the learning rate.")
        config = self.accelerator.unwrap_model(self.model).adapter.config
        metadata = {"base": config.base.value, "instruction_encoder": config.instruction_encoder.value}
        return Adapter.from_state_dict(state, metadata)

    def facts(self) -> dict[str, Any]:
        """What is kept as JSON: the scale of fp16 losses."""
        scaler = self.accelerator.scaler
        return {"scaler": scaler.state_dict() if scaler is not None else None}

    def load(self, folder: Path, facts: dict[str, Any]) -> None:
        """Take everything back from `write` and `facts`."""
        from safetensors.torch import load_file

        model: dict[str, Any] = {PREFIX + name: tensor for name, tensor in load_file(folder / ADAPTER).items()}
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        optimizer["param_groups"] = [  # the settings count, also where an older run had its weights in one group
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)
        if self.averages:
            for name, tensor in load_file(folder / AVERAGE).items():
                copy_whole(self.averages[PREFIX + name], tensor)
        if facts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, where FSDP keeps only one of them here."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one of which this process may keep only a part."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
