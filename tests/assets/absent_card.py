"""A graphics card that is not there: `Card` makes tensors that have a shape and a device but no numbers, so that code
for a card runs on any machine, and a tensor left on the wrong device is an error, as it would be on a real card.

On top of torch's own `FakeTensorMode`, which does the most of it:
- torch's build for CPUs knows of no cards at all: it is told as much of one as autograd asks for (`_guard`).
- A number read back from the card, which no fake tensor has, is 1; nobody waits for the card.
- Operations that torch's fakes let pass with tensors of two devices, and cards do not, are refused too.
- So are matrix products on the CPU: the host's layers cast their weights to wherever a stray input lies, and are slow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda:0")
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_, aten._foreach_copy_)
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution)
INDEXING = (aten.index, aten.index_put, aten.index_put_)  # a card takes an index from the CPU


class StrayDevice(RuntimeError):
    """An operation was given tensors of two devices, or of the CPU where only a card is quick."""


class Card(FakeTensorMode):
    """Within it, tensors on ``cuda:0`` can be made and computed with. Real tensors count as the CPU's.

    Attributes:
        products_on_cpu: whether matrix products on the CPU are let pass, where someone else chose to have them there.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.products_on_cpu = False

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():  # of several operations, as they come in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            known = args[0].constant if isinstance(args[0], FakeTensor) else args[0]
            return (torch.ones((), dtype=args[0].dtype) if known is None else known).item()
        kind = func.overloadpacket
        if kind not in COPIES and not (kind in INDEXING and args[0].device == CARD):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            # Of a single number on the CPU, cards take the value.
            devices = {str(tensor.device) for tensor in tensors if tensor.ndim or tensor.device != CPU}
            if len(devices) > 1:
                raise StrayDevice(f"{func} was given tensors on {' and '.join(sorted(devices))}")
            if kind in PRODUCTS and devices == {"cpu"} and not self.products_on_cpu:
                raise StrayDevice(f"{func} was left to the CPU")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    """A card for a module of tests, which enter it themselves."""
    with pytest.MonkeyPatch.context() as patch, _guard():
        patch.setattr(nn.Module, "_apply", _apply)
        for name, answer in {"synchronize": None, "current_device": CARD.index, "set_device": None}.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        yield Card()


@contextmanager
def _guard() -> Iterator[None]:
    """Have torch answer autograd's questions about the current card, as a build for cards does where none is there.

    Only in the place of a guard that counts no cards does torch put one that does nothing.
    """
    if torch.cuda._is_compiled():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # the CPU's, CUDA's
    no_cards = ctypes.CFUNCTYPE(ctypes.c_byte, ctypes.c_void_p)(lambda _: 0)
    methods = (ctypes.c_void_p * 32)(*[ctypes.cast(no_cards, ctypes.c_void_p).value] * 32)
    counting_none = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    guards[1] = ctypes.addressof(counting_none)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[1] != ctypes.addressof(counting_none)
    yield
    guards[1] = None


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """A module's own, which cannot change fake parameters in place: those that change are replaced."""
    for each in module.modules() if recurse else [module]:
        for name, parameter in each._parameters.items():
            if parameter is not None:
                changed = change(parameter.detach())
                if (changed.device, changed.dtype) != (parameter.device, parameter.dtype):
                    each._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        each._buffers.update({name: change(buffer) for name, buffer in each._buffers.items() if buffer is not None})
    return module


def backward(loss: Tensor) -> None:
    """Autograd's engine in short: torch's own asks the card for streams, which its build for CPUs has not."""
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += {following for following, _ in node.next_functions if following is not None}.difference(nodes)
    gradients: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in nodes}
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in sorted(nodes, key=lambda node: -1 if hasattr(node, "variable") else node._sequence_nr(), reverse=True):
        given = node(*gradients[node])
        given = given if isinstance(given, tuple) else (given,)
        for (following, place), gradient in zip(node.next_functions, given, strict=True):
            if following is not None and gradient is not None:
                wanted = following._input_metadata[place]
                if gradient.device != wanted.device:
                    raise StrayDevice(f"{node} gave {following} a gradient on {gradient.device}, not {wanted.device}")
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                before = gradients[following][place]
                gradients[following][place] = gradient if before is None else before + gradient
