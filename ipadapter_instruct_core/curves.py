"""How the adapter's weight changes while a picture is sampled."""

from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Curve(Enum):
    """The course of the weight from the first to the last step in which the adapter acts."""

    CONSTANT = "constant"
    EASE_IN = "ease in"
    EASE_OUT = "ease out"
    EASE_IN_OUT = "ease in-out"
    EASE_OUT_IN = "ease out-in"

    def factor(self, progress: float) -> float:
        """What the weight is multiplied by, 0-1, at a progress of 0-1; smooth at both ends (3p² - 2p³)."""
        rising = _smooth(progress)
        there_and_back = _smooth(1 - abs(2 * progress - 1))
        return {
            Curve.CONSTANT: 1.0,
            Curve.EASE_IN: rising,
            Curve.EASE_OUT: 1 - rising,
            Curve.EASE_IN_OUT: there_and_back,
            Curve.EASE_OUT_IN: 1 - there_and_back,
        }[self]


def _smooth(progress: float) -> float:
    return progress * progress * (3 - 2 * progress)


class CurveTable(NamedTuple):
    """A curve over noise levels, to be looked up on the device where the noise level is.

    Attributes:
        sigmas: [K], rising.
        lines: [K, 3]: of the stretch that begins at each, its sigma, its factor there, and the factor's slope.
    """

    sigmas: Tensor
    lines: Tensor

    @classmethod
    def of(cls, points: list[tuple[float, float]]) -> "CurveTable":
        """Of (sigma, factor) pairs, sigmas rising; between them the factor is drawn straight."""
        lines = [
            (sigma, factor, (after - factor) / max(above - sigma, 1e-12))
            for (sigma, factor), (above, after) in pairwise(points)
        ]
        lines.append((*points[-1], 0.0))
        return cls(torch.tensor([sigma for sigma, _ in points]), torch.tensor(lines))

    def to(self, device: torch.device) -> "CurveTable":
        return CurveTable(self.sigmas.to(device), self.lines.to(device))

    def factor(self, sigmas: Tensor) -> Tensor:
        """[1], the factor at the first of the noise levels, without a look at it from the CPU."""
        sigma = sigmas[:1].to(self.sigmas)
        place = torch.searchsorted(self.sigmas, sigma, right=True).sub_(1).clamp_(min=0)
        start, factor, slope = self.lines[place].unbind(-1)
        return torch.addcmul(factor, slope, (sigma - start).clamp_(min=0))
