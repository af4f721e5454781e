"""Draws the two hints that the ControlNet workflows load: a scribbled cottage, and a waving figure as OpenPose joints.

`python -m tools.workflows.hint_pictures` writes them into workflows/inputs.
"""

from __future__ import annotations

import colorsys
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

INPUTS = Path(__file__).resolve().parents[2] / "workflows" / "inputs"
SCRIBBLE, POSE = "cottage_scribble.png", "waving_pose.png"
SIZE, OVERSAMPLING = 512, 2
Point = tuple[float, float]

# Polylines in pixels of the 512 × 512 picture; y points down.
COTTAGE: list[list[Point]] = [
    [(0, 400), (90, 385), (200, 396), (330, 388), (430, 398), (512, 386)],  # the ground
    [(0, 250), (80, 150), (150, 215), (255, 85), (350, 190), (410, 140), (512, 240)],  # mountains
    [(110, 395), (112, 275), (292, 273), (294, 392)],  # walls
    [(90, 282), (150, 195), (258, 193), (316, 280), (90, 282)],  # roof
    [(235, 193), (236, 150), (262, 150), (263, 202)],  # chimney
    [(180, 393), (181, 320), (225, 319), (226, 393)],  # door
    [(126, 300), (166, 299), (167, 342), (127, 343), (126, 300)],
    [(146, 300), (147, 342)],
    [(240, 299), (280, 300), (280, 342), (241, 342), (240, 299)],
    [(260, 300), (261, 341)],
    [(400, 394), (398, 300)],  # tree
    [(418, 394), (420, 300)],
    [(185, 393), (160, 430), (190, 465), (150, 512)],  # path
    [(224, 393), (215, 430), (255, 465), (225, 512)],
]
CROWN: tuple[Point, float, float] = ((409, 250), 58, 66)  # centre and radii of the tree's crown

# OpenPose's eighteen joints, numbered as COCO's, of a person seen to the hips who waves.
JOINTS: dict[int, Point] = {
    0: (256, 150), 1: (256, 258), 2: (178, 260), 3: (104, 334), 4: (86, 190), 5: (334, 260), 6: (368, 368),
    7: (346, 474), 8: (210, 486), 11: (302, 486), 14: (238, 130), 15: (274, 130), 16: (212, 142), 17: (300, 142),
}  # fmt: skip
LIMBS = [
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
]  # fmt: skip
LIMB_WIDTH, JOINT_RADIUS, LIMB_BRIGHTNESS = 9, 5, 0.6


def scribble() -> Image.Image:
    """Black on white, with the unsteady strokes of a hand."""
    picture = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), "white")
    draw = ImageDraw.Draw(picture)
    shake = random.Random(0)
    (x, y), across, down = CROWN
    crown = [
        (x + (across + 5 * math.sin(9 * a)) * math.cos(a), y + (down + 5 * math.sin(9 * a)) * math.sin(a))
        for a in (2 * math.pi * step / 60 for step in range(61))
    ]
    for line in [*COTTAGE, crown]:
        points = [(px + shake.uniform(-1, 1), py + shake.uniform(-1, 1)) for px, py in _subdivided(line)]
        draw.line([_scaled(point) for point in points], "black", 4 * OVERSAMPLING, joint="curve")
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def pose() -> Image.Image:
    """Limbs and joints on black, in the rainbow that the OpenPose ControlNet was trained on."""
    picture = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), "black")
    draw = ImageDraw.Draw(picture)
    for index, (start, end) in enumerate(LIMBS):
        if start in JOINTS and end in JOINTS:
            colour = tuple(round(LIMB_BRIGHTNESS * value) for value in _rainbow(index))
            draw.polygon([_scaled(point) for point in _ellipse(JOINTS[start], JOINTS[end], LIMB_WIDTH / 2)], colour)
    for index, joint in JOINTS.items():
        x, y = _scaled(joint)
        radius = JOINT_RADIUS * OVERSAMPLING
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _rainbow(index))
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _rainbow(index: int) -> tuple[int, int, int]:
    """The index-th of eighteen hues round the colour wheel."""
    red, green, blue = colorsys.hsv_to_rgb(index * 20 / 360, 1, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def _ellipse(start: Point, end: Point, radius: float) -> list[Point]:
    """The outline of a limb: an ellipse from joint to joint."""
    (x0, y0), (x1, y1) = start, end
    angle, half = math.atan2(y1 - y0, x1 - x0), math.dist(start, end) / 2
    outline = []
    for step in range(48):
        along, across = half * math.cos(step * math.pi / 24), radius * math.sin(step * math.pi / 24)
        outline.append(
            (
                (x0 + x1) / 2 + along * math.cos(angle) - across * math.sin(angle),
                (y0 + y1) / 2 + along * math.sin(angle) + across * math.cos(angle),
            )
        )
    return outline


def _subdivided(line: list[Point], piece: float = 12) -> list[Point]:
    points = [line[0]]
    for start, end in zip(line, line[1:], strict=False):
        pieces = max(1, round(math.dist(start, end) / piece))
        points += [
            (start[0] + (end[0] - start[0]) * i / pieces, start[1] + (end[1] - start[1]) * i / pieces)
            for i in range(1, pieces + 1)
        ]
    return points


def _scaled(point: Point) -> Point:
    return point[0] * OVERSAMPLING, point[1] * OVERSAMPLING


def main() -> None:
    INPUTS.mkdir(parents=True, exist_ok=True)
    scribble().save(INPUTS / SCRIBBLE, optimize=True)
    pose().save(INPUTS / POSE, optimize=True)


if __name__ == "__main__":
    main()
