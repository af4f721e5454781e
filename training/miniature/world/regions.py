"""The regions of a picture, and the pen that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from PIL import ImageDraw

_CIRCLE = np.stack([np.cos(np.arange(28) * np.pi / 14), np.sin(np.arange(28) * np.pi / 14)], axis=1)


class Region(IntEnum):
    """What a pixel belongs to; a style gives each its colour."""

    SKY = 0
    SKY_DETAIL = 1
    FAR = 2
    GROUND = 3
    GROUND_DETAIL = 4
    SNOW_CAP = 5
    PANE = 6
    EMPTY = 7
    MAIN = 8
    LIGHT = 9
    DARK = 10
    ACCENT = 11
    LEAF = 12
    SKIN = 13
    CHEEK = 14
    HAIR = 15
    EYE_WHITE = 16
    EYE = 17
    MOUTH = 18
    TEETH = 19
    GLASSES = 20
    SHIRT = 21


FIRST_OF_SUBJECT = Region.MAIN


class Pen:
    """Draws shapes given in a figure's own units: (0, 0) its centre, 1 half its size, y downwards.

    Args:
        scale: pixels of the surface for one pixel of the picture.
        x, y, half: centre and half size in pixels of the picture; left out, units are these pixels.
    """

    def __init__(
        self,
        surface: ImageDraw.ImageDraw,
        scale: int,
        x: float = 0,
        y: float = 0,
        half: float = 1,
        mirror: bool = False,
    ) -> None:
        self._surface = surface
        self._scale = scale * half
        self._origin = np.array([x * scale, y * scale])
        self._sides = np.array([-1.0 if mirror else 1.0, 1.0])
        self._turn = np.eye(2)
        self._pivot = np.zeros(2)

    def rotate(self, degrees: float, pivot: tuple[float, float]) -> None:
        """Everything drawn from now on is turned around a point."""
        angle = np.deg2rad(degrees)
        self._turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self._pivot = np.array(pivot)

    def _place(self, points: Sequence[tuple[float, float]] | np.ndarray) -> list[tuple[float, float]]:
        turned = (np.asarray(points, dtype=float) - self._pivot) @ self._turn + self._pivot
        return [tuple(point) for point in turned * self._sides * self._scale + self._origin]

    def polygon(self, points: Sequence[tuple[float, float]] | np.ndarray, region: Region) -> None:
        self._surface.polygon(self._place(points), fill=int(region))

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, region: Region) -> None:
        self.polygon(_CIRCLE * (radius_x, radius_y) + (x, y), region)

    def box(self, left: float, top: float, right: float, bottom: float, region: Region) -> None:
        if bottom > top:
            self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], region)

    def stroke(self, points: Sequence[tuple[float, float]], width: float, region: Region) -> None:
        pixels = max(round(width * self._scale), 1)
        self._surface.line(self._place(points), fill=int(region), width=pixels, joint="curve")

    def ring(self, x: float, y: float, radius_x: float, radius_y: float, width: float, region: Region) -> None:
        circle = _CIRCLE * (radius_x, radius_y) + (x, y)
        self.stroke([*map(tuple, circle), tuple(circle[0]), tuple(circle[1])], width, region)
