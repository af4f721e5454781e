"""Random weights of full shape in files of about a megabyte: views of a few short, shared random buffers.

A view with overlapping rows, `W[i, j] = buffer[start + stride·i + j]`, has all the shape and, for a test's purposes,
all the randomness of a real matrix, and `torch.save` stores the shared buffer only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .shapes import Shapes

ROW_STRIDE = 7  # coprime to the widths, so that rows do not repeat; 1 for tables with very many rows
MANY_ROWS = 10_000
SPREAD = 4096  # how far apart two tensors of one buffer can start
Gain = Callable[[str], float]


def strided_weights(shapes: Shapes, gain: Gain, seed: int) -> dict[str, torch.Tensor]:
    """Fill a table of shapes: norm weights 1, other vectors 0, matrices and convolutions N(0, (gain/√fan_in)²).

    Args:
        shapes: {key: shape}.
        gain: key → factor on the standard deviation that keeps a layer's output as large as its input.
        seed: decides every number.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = {key: shape for key, shape in shapes.items() if len(shape) > 1}
    deviations = {key: _deviation(key, shape, gain(key)) for key, shape in matrices.items()}
    buffers: dict[float, torch.Tensor] = {}
    for deviation in sorted(set(deviations.values())):
        length = max(_span(matrices[key]) for key, value in deviations.items() if value == deviation) + SPREAD
        buffers[deviation] = torch.randn(length, generator=generator) * deviation
    constants = {value: torch.full((1,), value) for value in (0.0, 1.0)}
    weights = {}
    for key, shape in shapes.items():
        if key in matrices:
            start = int(torch.randint(SPREAD, (1,), generator=generator))
            weights[key] = torch.as_strided(buffers[deviations[key]], shape, _strides(shape), start)
        else:
            weights[key] = constants[float(key.endswith("weight"))].expand(shape)
    return weights


def _deviation(key: str, shape: tuple[int, ...], gain: float) -> float:
    is_table = key.endswith(("embedding.weight", "latents")) and "patch" not in key
    fan_in = 1 if is_table else math.prod(shape[1:])
    return round(gain / math.sqrt(fan_in), 6)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    inner = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    return (1 if shape[0] > MANY_ROWS else ROW_STRIDE, *inner)


def _span(shape: tuple[int, ...]) -> int:
    return _strides(shape)[0] * (shape[0] - 1) + math.prod(shape[1:])
