"""A person's head and shoulders: identity (hair, skin, glasses, beard, shape) against expression and pose."""

from __future__ import annotations

import numpy as np
from training.miniature.world.factors import Identity
from training.miniature.world.regions import Pen, Region


def draw_face(pen: Pen, identity: Identity, expression: str, tilt: float, turn: float) -> None:
    """Draw a portrait.

    Args:
        tilt: of the head, in degrees; turn: -1 to 1, how far the features stand aside.
    """
    pen.polygon([(-1.0, 1.25), (-0.8, 0.86), (-0.3, 0.74), (0.3, 0.74), (0.8, 0.86), (1.0, 1.25)], Region.SHIRT)
    pen.rotate(tilt, (0, 0.6))
    width = 0.62 if identity.round_face else 0.5
    _hair_behind(pen, identity.hair, width)
    pen.box(-0.2, 0.4, 0.2, 0.84, Region.SKIN)
    for side in (-1, 1):
        pen.ellipse(side * width, 0.08, 0.12, 0.16, Region.SKIN)
    pen.ellipse(0, 0, width, 0.66, Region.SKIN)
    aside = 0.12 * turn
    if identity.beard:
        outline = [(np.cos(a) * width * 1.04, 0.12 + np.sin(a) * 0.62) for a in np.linspace(0, np.pi, 16)]
        pen.polygon([*outline, (-0.3 + aside, 0.24), (0.3 + aside, 0.24)], Region.HAIR)
    _hair_before(pen, identity.hair, width)
    _features(pen, expression, aside, identity.beard)
    if identity.glasses:
        for side in (-1, 1):
            pen.ring(side * 0.25 + aside, 0.02, 0.2, 0.2, 0.085, Region.GLASSES)
        pen.stroke([(-0.06 + aside, 0), (0.06 + aside, 0)], 0.085, Region.GLASSES)


def _features(pen: Pen, expression: str, aside: float, beard: bool) -> None:
    brow = {"happy": (-0.25, -0.28), "sad": (-0.2, -0.36), "surprised": (-0.4, -0.4), "sleepy": (-0.22, -0.22)}[
        expression
    ]
    for side in (-1, 1):
        x = side * 0.25 + aside
        pen.stroke([(x + side * 0.15, brow[0]), (x - side * 0.12, brow[1])], 0.08, Region.EYE)
        if expression == "sleepy":
            pen.stroke([(x - 0.13, 0.02), (x, 0.08), (x + 0.13, 0.02)], 0.08, Region.EYE)
            continue
        tall = 0.19 if expression == "surprised" else 0.13
        pen.ellipse(x, 0.02, 0.14, tall, Region.EYE_WHITE)
        pen.ellipse(x + aside * 0.4, 0.03, 0.075, 0.09, Region.EYE)
    pen.ellipse(aside * 1.4, 0.17, 0.07, 0.08, Region.CHEEK)
    x, y = aside, 0.4
    if expression == "happy":
        pen.polygon(
            [(x - 0.29, y - 0.1), (x + 0.29, y - 0.1), (x + 0.2, y + 0.1), (x, y + 0.18), (x - 0.2, y + 0.1)],
            Region.MOUTH,
        )
        pen.polygon([(x - 0.24, y - 0.1), (x + 0.24, y - 0.1), (x + 0.19, y), (x - 0.19, y)], Region.TEETH)
    elif expression == "sad":
        pen.stroke([(x - 0.22, y + 0.14), (x - 0.12, y), (x + 0.12, y), (x + 0.22, y + 0.14)], 0.1, Region.MOUTH)
    elif expression == "surprised":
        pen.ellipse(x, y + 0.03, 0.14, 0.18, Region.MOUTH)
    else:
        pen.stroke([(x - 0.13, y + 0.02), (x + 0.13, y + 0.02)], 0.08, Region.MOUTH)


def _hair_behind(pen: Pen, hair: str, width: float) -> None:
    if hair == "long":
        pen.ellipse(0, -0.15, width + 0.22, 0.68, Region.HAIR)
        pen.polygon(
            [(-width - 0.22, -0.1), (width + 0.22, -0.1), (width + 0.3, 0.95), (-width - 0.3, 0.95)], Region.HAIR
        )
    elif hair == "bob":
        pen.ellipse(0, -0.15, width + 0.24, 0.66, Region.HAIR)
        pen.box(-width - 0.24, -0.15, width + 0.24, 0.45, Region.HAIR)
    elif hair == "curly":
        for angle in np.linspace(-0.25 * np.pi, 1.25 * np.pi, 11):
            pen.ellipse(np.cos(angle) * (width + 0.14), -0.18 - np.sin(angle) * 0.56, 0.27, 0.27, Region.HAIR)
    elif hair == "bun":
        pen.ellipse(0, -0.82, 0.28, 0.26, Region.HAIR)
    elif hair == "pigtails":
        for side in (-1, 1):
            pen.ellipse(side * (width + 0.28), 0.12, 0.24, 0.36, Region.HAIR)


def _hair_before(pen: Pen, hair: str, width: float) -> None:
    crown = [(np.cos(a) * (width + 0.04), -0.12 - np.sin(a) * 0.58) for a in np.linspace(0, np.pi, 16)]
    if hair == "short":
        pen.polygon([*crown, (-width, -0.05), (-0.3, -0.42), (width - 0.05, -0.3)], Region.HAIR)
    elif hair == "spiky":
        tips = [(-1.2, -0.62), (-0.72, -1.0), (0, -1.14), (0.72, -1.0), (1.2, -0.62)]
        points: list[tuple[float, float]] = [(-width - 0.03, 0.0)]
        for number, (x, y) in enumerate(tips):
            points += [(x * width, y), ((x + 0.3) * width, -0.62 - 0.05 * (number in (1, 2)))]
        pen.polygon([*points, (width + 0.03, 0.0), (width - 0.1, -0.36), (-width + 0.1, -0.36)], Region.HAIR)
    elif hair == "long":
        pen.polygon(
            [*crown, (-width - 0.04, 0.3), (-width + 0.1, -0.1), (0, -0.5), (width - 0.1, -0.1), (width + 0.04, 0.3)],
            Region.HAIR,
        )
    elif hair == "bob":
        pen.polygon(
            [*crown, (-width - 0.04, 0.4), (-width + 0.1, -0.22), (width - 0.1, -0.22), (width + 0.04, 0.4)],
            Region.HAIR,
        )
    elif hair in ("bun", "pigtails"):
        pen.polygon([*crown, (-width, -0.12), (0, -0.44), (width, -0.12)], Region.HAIR)
    elif hair == "curly":
        pen.polygon([*crown, (-width, -0.16), (-0.2, -0.4), (0.2, -0.4), (width, -0.16)], Region.HAIR)
