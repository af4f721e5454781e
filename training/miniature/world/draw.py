"""Factors -> a map of regions (sky, ground, the subject's parts ...), before any style gives them colour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from training.miniature.world.faces import draw_face
from training.miniature.world.factors import IDENTITIES, PERSON, Factors
from training.miniature.world.regions import Pen, Region

SIZE = 64
SCALE = 2  # regions are drawn at twice the size, for smooth edges

# Centre x, y and half the size of each subject, and the height of the horizon, in pixels of 64.
LAYOUTS: dict[str, tuple[float, tuple[tuple[float, float, float], ...]]] = {
    "large": (45, ((32, 33, 27),)),
    "upper left": (28, ((18, 20, 16.5),)),
    "lower right": (34, ((46, 46, 16.5),)),
    "far right": (46, ((50, 31, 12),)),
    "pair": (44, ((17, 36, 15.5), (47, 36, 15.5))),
    "near and far": (30, ((21, 42, 20), (52, 17, 11.5))),
    "portrait": (40, ((32, 33, 27),)),
}


def draw(factors: Factors) -> np.ndarray:
    """[128, 128] uint8 of `Region` numbers."""
    generator = np.random.default_rng(factors.jitter)
    image = Image.new("L", (SIZE * SCALE, SIZE * SCALE), int(Region.SKY))
    surface = ImageDraw.Draw(image)
    horizon, places = LAYOUTS[factors.layout]
    horizon += generator.uniform(-1.5, 1.5)
    SCENERY[factors.scene](Pen(surface, SCALE), horizon, generator)
    if factors.subject == PERSON:
        x, y, half = places[0]
        pen = Pen(surface, SCALE, x, y + 1, half * factors.zoom)
        draw_face(pen, IDENTITIES[factors.identity], factors.expression, factors.tilt, factors.turn)
        return np.asarray(image)
    mirror = bool(generator.integers(2))
    for x, y, half in sorted(places, key=lambda place: place[2]):
        shift_x, shift_y = generator.uniform(-1.5, 1.5, 2)
        half *= generator.uniform(0.94, 1.04)
        THINGS[factors.subject](Pen(surface, SCALE, x + shift_x, y + shift_y, half, mirror=mirror))
    return np.asarray(image)


def draw_cut_out(factors: Factors) -> np.ndarray:
    """[128, 128] regions of the subject alone, large, on an empty square."""
    image = Image.new("L", (SIZE * SCALE, SIZE * SCALE), int(Region.EMPTY))
    mirror = bool(np.random.default_rng(factors.jitter).integers(2))
    THINGS[factors.subject](Pen(ImageDraw.Draw(image), SCALE, 32, 32, 24, mirror=mirror))
    return np.asarray(image)


def meadow(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    pen.ellipse(8, horizon + 8, 34, 16, Region.FAR)
    pen.ellipse(40, horizon + 20, 52, 22, Region.GROUND)
    pen.box(0, horizon + 8, 64, 64, Region.GROUND)
    x, y = generator.uniform(38, 46), generator.uniform(9, 11)
    for dx, dy, radius in ((-8, 2, 5), (0, -1, 7), (8, 2, 5)):
        pen.ellipse(x + dx, y + dy, radius + 2, radius, Region.SKY_DETAIL)


def sea(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    pen.ellipse(generator.uniform(44, 52), 11, 8, 8, Region.SKY_DETAIL)
    across = np.arange(-2, 68, 1)
    for top, region in ((horizon, Region.GROUND_DETAIL), (horizon + 8, Region.GROUND)):
        waves = top - 3 * np.abs(np.sin((across + 8 * (region == Region.GROUND)) * np.pi / 16))
        pen.polygon([*zip(across.tolist(), waves.tolist(), strict=True), (68, 64), (-2, 64)], region)


def night(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    x, y = generator.uniform(46, 52), generator.uniform(11, 13)
    pen.ellipse(x, y, 9, 9, Region.SKY_DETAIL)
    pen.ellipse(x + 5, y - 3, 7.5, 7.5, Region.SKY)
    for x, y in ((10, 9), (28, 16), (8, 30), (30, 36), (56, 34)):
        if y < horizon - 5:
            angles = np.arange(8) * np.pi / 4
            points = [(x + r * np.sin(a), y - r * np.cos(a)) for a, r in zip(angles, (5, 2) * 4, strict=True)]
            pen.polygon(points, Region.SKY_DETAIL)
    pen.polygon([(0, horizon), (64, horizon), (64, 64), (0, 64)], Region.GROUND)


def desert(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    pen.ellipse(generator.uniform(44, 50), horizon - 6, 13, 13, Region.SKY_DETAIL)
    pen.ellipse(12, horizon + 22, 36, 26, Region.GROUND)
    pen.box(0, horizon + 10, 64, 64, Region.GROUND)
    pen.polygon([(0, 64), (16, horizon + 16), (40, horizon + 8), (64, horizon - 1), (64, 64)], Region.GROUND_DETAIL)


def snow(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    shift = generator.uniform(-2, 2)
    for x, top, half in ((10 + shift, 20, 22), (46 + shift, 26, 26)):
        peak = horizon - top
        pen.polygon([(x - half, horizon + 2), (x, peak), (x + half, horizon + 2)], Region.FAR)
        pen.polygon(
            [(x - half * 0.42, peak + top * 0.42), (x, peak), (x + half * 0.42, peak + top * 0.42)], Region.SNOW_CAP
        )
    pen.box(0, horizon, 64, 64, Region.GROUND)


def room(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    x = generator.uniform(42, 46)
    pen.box(x - 14, 3, x + 14, min(horizon - 4, 31), Region.SKY_DETAIL)
    bottom = min(horizon - 7, 28)
    for left in (x - 11, x + 1.5):
        pen.box(left, 6, left + 9.5, bottom, Region.PANE)
    pen.box(0, horizon, 64, 64, Region.GROUND)
    pen.box(0, horizon, 64, horizon + 4, Region.SKY_DETAIL)
    pen.polygon([(8, 64), (20, horizon + 11), (50, horizon + 11), (62, 64)], Region.GROUND_DETAIL)  # a rug


SCENERY: dict[str, Callable[[Pen, float, np.random.Generator], None]] = {
    "meadow": meadow, "sea": sea, "night": night, "desert": desert, "snow": snow, "room": room,
}  # fmt: skip


def cat(pen: Pen) -> None:
    pen.stroke([(0.35, 0.85), (0.8, 0.8), (0.92, 0.4), (0.75, 0.1)], 0.24, Region.MAIN)
    pen.ellipse(0, 0.5, 0.5, 0.52, Region.MAIN)
    pen.ellipse(0, 0.62, 0.26, 0.34, Region.LIGHT)
    for side in (-1, 1):
        pen.polygon([(side * 0.58, -0.3), (side * 0.56, -1.0), (side * 0.08, -0.62)], Region.MAIN)
    pen.ellipse(0, -0.28, 0.6, 0.46, Region.MAIN)
    for side in (-1, 1):
        pen.ellipse(side * 0.26, -0.3, 0.18, 0.18, Region.LIGHT)
        pen.ellipse(side * 0.24, -0.3, 0.1, 0.16, Region.DARK)


def fish(pen: Pen) -> None:
    pen.polygon([(0.35, 0), (1.0, -0.52), (0.85, 0), (1.0, 0.52)], Region.ACCENT)
    pen.polygon([(-0.4, -0.35), (0.05, -0.8), (0.35, -0.25)], Region.ACCENT)
    pen.ellipse(-0.2, 0, 0.76, 0.5, Region.MAIN)
    pen.ellipse(0.1, 0, 0.12, 0.44, Region.LIGHT)
    pen.ellipse(-0.55, -0.1, 0.2, 0.2, Region.LIGHT)
    pen.ellipse(-0.58, -0.1, 0.11, 0.11, Region.DARK)


def house(pen: Pen) -> None:
    pen.box(-0.72, -0.1, 0.72, 1.0, Region.LIGHT)
    pen.polygon([(-1.0, -0.05), (0, -0.98), (1.0, -0.05)], Region.MAIN)
    pen.box(-0.5, 0.3, -0.05, 1.0, Region.DARK)
    pen.box(0.18, 0.25, 0.55, 0.62, Region.ACCENT)


def tree(pen: Pen) -> None:
    pen.polygon([(-0.14, 0), (0.14, 0), (0.24, 1.0), (-0.24, 1.0)], Region.DARK)
    for x, y, radius in ((-0.46, -0.05, 0.42), (0.46, -0.05, 0.42), (0, -0.45, 0.54), (0, 0.1, 0.4)):
        pen.ellipse(x, y, radius, radius, Region.MAIN)


def boat(pen: Pen) -> None:
    pen.stroke([(0, -0.98), (0, 0.5)], 0.12, Region.DARK)
    pen.polygon([(0.1, -0.95), (0.1, 0.3), (0.85, 0.3)], Region.LIGHT)
    pen.polygon([(-0.1, -0.7), (-0.1, 0.3), (-0.65, 0.3)], Region.ACCENT)
    pen.polygon([(-1.0, 0.42), (1.0, 0.42), (0.68, 0.98), (-0.68, 0.98)], Region.MAIN)


def car(pen: Pen) -> None:
    pen.polygon([(-0.66, 0.06), (-0.4, -0.5), (0.34, -0.5), (0.66, 0.06)], Region.MAIN)
    pen.polygon([(-0.46, 0.06), (-0.28, -0.36), (0.24, -0.36), (0.46, 0.06)], Region.ACCENT)
    pen.polygon([(-1.0, 0.15), (-0.9, 0), (0.85, 0), (1.0, 0.2), (1.0, 0.6), (-1.0, 0.6)], Region.MAIN)
    for side in (-0.54, 0.54):
        pen.ellipse(side, 0.6, 0.29, 0.29, Region.DARK)


def mushroom(pen: Pen) -> None:
    pen.polygon([(-0.22, 0), (0.22, 0), (0.34, 0.98), (-0.34, 0.98)], Region.LIGHT)
    top = [(np.cos(a) * 0.98, 0.12 - np.sin(a) * 1.0) for a in np.linspace(0, np.pi, 20)]
    pen.polygon([*top, (-0.6, 0.26), (0.6, 0.26)], Region.MAIN)
    for x, y, radius in ((-0.5, -0.2, 0.2), (0.03, -0.5, 0.22), (0.54, -0.16, 0.2)):
        pen.ellipse(x, y, radius, radius, Region.LIGHT)


def flower(pen: Pen) -> None:
    pen.stroke([(0, 0), (0.04, 1.0)], 0.15, Region.LEAF)
    pen.ellipse(-0.28, 0.66, 0.28, 0.13, Region.LEAF)
    pen.ellipse(0.32, 0.76, 0.28, 0.13, Region.LEAF)
    for angle in np.arange(6) * np.pi / 3 + np.pi / 6:
        pen.ellipse(0.42 * np.cos(angle), -0.32 + 0.42 * np.sin(angle), 0.26, 0.26, Region.MAIN)
    pen.ellipse(0, -0.32, 0.24, 0.24, Region.ACCENT)


THINGS: dict[str, Callable[[Pen], None]] = {
    "cat": cat, "fish": fish, "house": house, "tree": tree,
    "boat": boat, "car": car, "mushroom": mushroom, "flower": flower,
}  # fmt: skip
