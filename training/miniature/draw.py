"""Factors -> a map of regions (sky, ground, the subject's parts ...), before any style gives them colour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from training.miniature.faces import draw_face
from training.miniature.factors import IDENTITIES, PERSON, Factors
from training.miniature.regions import Pen, Region

SIZE = 64
SCALE = 2  # regions are drawn at twice the size, for smooth edges

# Centre x, y and half the size of each subject, and the height of the horizon, in pixels of 64.
LAYOUTS: dict[str, tuple[float, tuple[tuple[float, float, float], ...]]] = {
    "large": (46, ((32, 33, 26),)),
    "far left": (27, ((17, 20, 14),)),
    "low right": (33, ((47, 47, 14),)),
    "pair": (42, ((17, 35, 15), (47, 35, 15))),
    "row": (38, ((11, 34, 10.5), (32, 34, 10.5), (53, 34, 10.5))),
    "near and far": (29, ((21, 42, 18), (51, 19, 10))),
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
    pen.ellipse(12, horizon + 4, 26, 11, Region.FAR)
    pen.ellipse(56, horizon + 5, 24, 14, Region.FAR)
    pen.box(0, horizon, 64, 64, Region.GROUND)
    x, y = generator.uniform(40, 52), generator.uniform(7, 10)
    for dx, dy, radius in ((-6, 1, 4), (0, -1, 5), (6, 1, 4)):
        pen.ellipse(x + dx, y + dy, radius + 1, radius, Region.SKY_DETAIL)
    for row, y in enumerate(np.arange(horizon + 6, 68, 13)):
        for x in range(6 + 9 * (row % 2), 66, 18):  # tufts of grass
            points = [(x - 3, y + 4), (x - 4, y - 3), (x, y + 1), (x + 4, y - 3), (x + 3, y + 4)]
            pen.polygon(points, Region.GROUND_DETAIL)


def sea(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    pen.ellipse(generator.uniform(10, 20), 9, 6, 6, Region.SKY_DETAIL)
    pen.box(0, horizon, 64, 64, Region.GROUND)
    for row, y in enumerate(np.arange(horizon + 6, 68, 9)):
        across = np.arange(-2, 68, 2)
        waves = y - 2.2 * np.sin((across + 8 * (row % 2)) * np.pi / 8)
        pen.stroke(list(zip(across, waves, strict=True)), 2.6, Region.GROUND_DETAIL)


def night(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    x, y = generator.uniform(46, 54), generator.uniform(9, 11)
    pen.ellipse(x, y, 7.5, 7.5, Region.SKY_DETAIL)
    pen.ellipse(x + 3.5, y - 2, 6, 6, Region.SKY)
    for x, y in ((7, 7), (20, 12), (34, 7), (8, 23), (33, 22), (57, 27), (44, 30), (20, 33)):
        if y < horizon - 4:
            angles = np.arange(8) * np.pi / 4
            points = [(x + r * np.sin(a), y - r * np.cos(a)) for a, r in zip(angles, (3.6, 1.4) * 4, strict=True)]
            pen.polygon(points, Region.SKY_DETAIL)
    pen.polygon(
        [
            (0, horizon + 3),
            (14, horizon - 2),
            (34, horizon + 2),
            (52, horizon - 2),
            (64, horizon + 2),
            (64, 64),
            (0, 64),
        ],
        Region.GROUND,
    )


def desert(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    pen.ellipse(generator.uniform(26, 38), horizon - 9, 10, 10, Region.SKY_DETAIL)
    pen.ellipse(14, horizon + 20, 34, 24, Region.GROUND)
    pen.ellipse(58, horizon + 17, 34, 20, Region.GROUND_DETAIL)
    pen.box(0, horizon + 12, 64, 64, Region.GROUND)
    pen.polygon([(0, horizon + 24), (30, horizon + 14), (64, horizon + 26), (64, 64), (0, 64)], Region.GROUND_DETAIL)
    x = 57
    for box in (
        (x - 1.7, -16, x + 1.7, 6),
        (x - 6, -8, x, -5),
        (x - 6, -13, x - 3.5, -5),
        (x, -5, x + 5.5, -2.5),
        (x + 3.5, -10, x + 6, -2.5),
    ):
        pen.box(box[0], horizon + box[1], box[2], horizon + box[3], Region.FAR)


def snow(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    for x, top, half in ((10, 20, 17), (52, 24, 19), (31, 13, 13)):
        peak = horizon - top
        pen.polygon([(x - half, horizon + 2), (x, peak), (x + half, horizon + 2)], Region.FAR)
        pen.polygon(
            [
                (x - half * 0.35, peak + top * 0.37),
                (x, peak),
                (x + half * 0.35, peak + top * 0.37),
                (x, peak + top * 0.28),
            ],
            Region.SKY_DETAIL,
        )
    pen.box(0, horizon, 64, 64, Region.GROUND)
    for row, y in enumerate(range(5, 64, 11)):
        for x in range(4 + 7 * (row % 2), 64, 14):
            pen.ellipse(x, y, 1.9, 1.9, Region.FLAKE)


def room(pen: Pen, horizon: float, generator: np.random.Generator) -> None:
    for x in range(0, 64, 16):  # wallpaper
        pen.box(x, 0, x + 6, horizon, Region.FAR)
    x = generator.uniform(40, 44)
    pen.box(x - 11, 3, x + 11, min(horizon - 5, 29), Region.SKY_DETAIL)
    bottom = min(horizon - 7, 27)
    for left in (x - 9, x + 1):
        pen.box(left, 5, left + 8, (5 + bottom) / 2 - 1, Region.PANE)
        pen.box(left, (5 + bottom) / 2 + 1, left + 8, bottom, Region.PANE)
    pen.box(0, horizon, 64, 64, Region.GROUND)
    pen.box(0, horizon, 64, horizon + 2.5, Region.SKY_DETAIL)
    for x in range(0, 80, 12):  # floor boards
        pen.stroke([(32 + (x - 36) * 0.6, horizon + 3), (32 + (x - 36) * 1.5, 66)], 1.4, Region.GROUND_DETAIL)


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
        pen.ellipse(side * 0.26, -0.34, 0.14, 0.16, Region.LIGHT)
        pen.ellipse(side * 0.24, -0.33, 0.07, 0.13, Region.DARK)
    pen.polygon([(-0.1, -0.14), (0.1, -0.14), (0, -0.02)], Region.DARK)


def fish(pen: Pen) -> None:
    pen.polygon([(0.35, 0), (1.0, -0.52), (0.85, 0), (1.0, 0.52)], Region.ACCENT)
    pen.polygon([(-0.4, -0.35), (0.05, -0.8), (0.35, -0.25)], Region.ACCENT)
    pen.ellipse(-0.2, 0, 0.76, 0.5, Region.MAIN)
    for x in (-0.05, 0.28):
        pen.ellipse(x, 0, 0.07, 0.42 - 0.3 * max(x, 0), Region.LIGHT)
    pen.ellipse(-0.58, -0.12, 0.15, 0.15, Region.LIGHT)
    pen.ellipse(-0.6, -0.12, 0.08, 0.08, Region.DARK)
    pen.stroke([(-0.92, 0.16), (-0.7, 0.2)], 0.08, Region.DARK)


def house(pen: Pen) -> None:
    pen.box(0.4, -0.9, 0.65, -0.2, Region.DARK)
    pen.box(-0.72, -0.1, 0.72, 1.0, Region.LIGHT)
    pen.polygon([(-1.0, -0.05), (0, -0.98), (1.0, -0.05)], Region.MAIN)
    pen.box(-0.5, 0.3, -0.05, 1.0, Region.DARK)
    pen.box(0.18, 0.25, 0.55, 0.62, Region.ACCENT)


def tree(pen: Pen) -> None:
    pen.polygon([(-0.14, 0), (0.14, 0), (0.24, 1.0), (-0.24, 1.0)], Region.DARK)
    for x, y, radius in ((-0.46, -0.05, 0.42), (0.46, -0.05, 0.42), (0, -0.45, 0.54), (0, 0.1, 0.4)):
        pen.ellipse(x, y, radius, radius, Region.MAIN)
    for x, y in ((-0.4, 0), (0.12, -0.55), (0.45, 0.05), (-0.15, -0.2)):
        pen.ellipse(x, y, 0.11, 0.11, Region.ACCENT)


def boat(pen: Pen) -> None:
    pen.stroke([(0, -0.98), (0, 0.5)], 0.12, Region.DARK)
    pen.polygon([(0.1, -0.95), (0.1, 0.3), (0.85, 0.3)], Region.LIGHT)
    pen.polygon([(-0.1, -0.7), (-0.1, 0.3), (-0.65, 0.3)], Region.ACCENT)
    pen.polygon([(-1.0, 0.42), (1.0, 0.42), (0.68, 0.98), (-0.68, 0.98)], Region.MAIN)
    pen.box(-0.86, 0.56, 0.86, 0.7, Region.LIGHT)


def car(pen: Pen) -> None:
    pen.polygon([(-0.66, 0.06), (-0.4, -0.5), (0.34, -0.5), (0.66, 0.06)], Region.MAIN)
    pen.polygon([(-0.48, 0.04), (-0.3, -0.36), (-0.06, -0.36), (-0.06, 0.04)], Region.ACCENT)
    pen.polygon([(0.06, 0.04), (0.06, -0.36), (0.25, -0.36), (0.46, 0.04)], Region.ACCENT)
    pen.polygon([(-1.0, 0.15), (-0.9, 0), (0.85, 0), (1.0, 0.2), (1.0, 0.6), (-1.0, 0.6)], Region.MAIN)
    for side in (-0.54, 0.54):
        pen.ellipse(side, 0.6, 0.29, 0.29, Region.DARK)
        pen.ellipse(side, 0.6, 0.12, 0.12, Region.LIGHT)


def mushroom(pen: Pen) -> None:
    pen.polygon([(-0.22, 0), (0.22, 0), (0.34, 0.98), (-0.34, 0.98)], Region.LIGHT)
    top = [(np.cos(a) * 0.98, 0.12 - np.sin(a) * 1.0) for a in np.linspace(0, np.pi, 20)]
    pen.polygon([*top, (-0.6, 0.26), (0.6, 0.26)], Region.MAIN)
    for x, y, radius in ((-0.5, -0.25, 0.17), (0.05, -0.55, 0.2), (0.52, -0.2, 0.17), (0, -0.03, 0.13)):
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
