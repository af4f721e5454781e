"""Weights under the host's memory manager: offloaded, reloaded and shared as it sees fit."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import comfy.model_management as management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher

from ...ipadapter_instruct_core import checkpoint
from ...ipadapter_instruct_core.adapter import Adapter
from ...ipadapter_instruct_core.config import AdapterConfig
from ...ipadapter_instruct_core.encoders import OpenClip, load_open_clip

Result = TypeVar("Result")
# What each model made of its last few inputs: changing a weight then encodes and projects nothing again.
_REMEMBERED = 8
_AT_A_TIME = 8  # pictures
_results: WeakKeyDictionary[Any, OrderedDict[Hashable, Any]] = WeakKeyDictionary()


def remembered(model: Any, key: Hashable, make: Callable[[], Result]) -> Result:
    """What ``make`` returned the last time for this model and key, while both are among the last few.

    For small results of a node's inputs; they are forgotten with the model.
    """
    known = _results.setdefault(model, OrderedDict())
    if key not in known:
        known[key] = make()
        if len(known) > _REMEMBERED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _working_precision(device: torch.device) -> torch.dtype:
    if management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float32


class StayingPatcher(ModelPatcher):
    """Weights that are not doubled where the host splits a model among graphics cards: keys and values are made once
    a run, and each card's call of the model takes them to itself."""

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> ModelPatcher:
        return self.clone()


def _patcher(module: torch.nn.Module) -> ModelPatcher:
    device = management.get_torch_device()
    return StayingPatcher(module, load_device=device, offload_device=management.unet_offload_device())


@dataclass(frozen=True, eq=False)
class HostedAdapter:
    """An adapter as the nodes pass it on: what `Load IPAdapter-Instruct Model` returns."""

    name: str
    adapter: Adapter
    patcher: ModelPatcher
    sha256: str = ""  # of the weights as the file has them

    @property
    def config(self) -> AdapterConfig:
        return self.adapter.config

    def load(self) -> torch.device:
        """Bring the weights to where the host computes, and say where that is."""
        management.load_model_gpu(self.patcher)
        return self.patcher.load_device

    def __deepcopy__(self, memo: dict) -> "HostedAdapter":
        return self  # the host deep-copies options when it clones a MODEL; weights are never copied


@dataclass(frozen=True, eq=False)
class HostedOpenClip:
    """An OpenCLIP model as the nodes pass it on; serves for a CLIP and for a CLIP vision."""

    name: str
    model: OpenClip
    patcher: ModelPatcher

    def load(self) -> torch.device:
        management.load_model_gpu(self.patcher)
        # With little room the host leaves weights on the CPU, for layers to cast, which open_clip's do not.
        self.model.to(self.patcher.load_device)
        return self.patcher.load_device

    def __getattr__(self, name: str) -> Any:
        """What another node looks for in a CLIP: the page lets it connect there too."""
        raise AttributeError(
            "This is an OpenCLIP model, which only Encode Instruction and Apply IPAdapter-Instruct can read; "
            "connect the CLIP of a checkpoint, or Load CLIP Vision, to this node."
        )


def load_adapter(path: str, name: str) -> HostedAdapter:
    # manual_cast lets the host keep weights in one precision and place, and compute in another.
    adapter = checkpoint.load(path, ops=comfy.ops.manual_cast)
    sha256 = checkpoint.weights_sha256(adapter.state_dict())
    adapter.to(_working_precision(management.get_torch_device()))
    return HostedAdapter(name, adapter, _patcher(adapter), sha256)


def load_hosted_open_clip(path: str, name: str) -> HostedOpenClip:
    model = load_open_clip(path).to(_working_precision(management.get_torch_device()))
    return HostedOpenClip(name, model, _patcher(model))


def on(device: torch.device) -> AbstractContextManager:
    """Work on a card that need not be the current one: newer hosts wait for weights that they stream on the current."""
    enter = getattr(management, "cuda_device_context", None)
    return enter(device) if enter else nullcontext()


def intermediate(tensor: torch.Tensor) -> torch.Tensor:
    """Move a small result to where the host keeps such, in full precision."""
    return tensor.to(management.intermediate_device(), torch.float32)


def few_at_a_time(encode: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """What ``encode`` makes of each of a batch, in memory that does not grow with their number but for the result."""
    return torch.cat([intermediate(encode(some)) for some in batch.split(_AT_A_TIME)])


def module_dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
