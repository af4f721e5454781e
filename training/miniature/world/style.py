"""A map of regions -> a picture in one of the styles: palette, line, texture and brushwork.

Textures stand still on the page and repeat every eight pixels, the size of a latent: a convolutional decoder then
knows them from the style alone, and the latents are free for what differs between pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageFilter
from training.miniature.world.draw import SCALE, SIZE, draw, draw_cut_out
from training.miniature.world.factors import IDENTITIES, PERSON, Factors
from training.miniature.world.regions import FIRST_OF_SUBJECT, Region

Rgb = tuple[int, int, int]

# Sky, its detail, what is far, ground, its detail.
SCENE_COLOURS: dict[str, tuple[Rgb, Rgb, Rgb, Rgb, Rgb]] = {
    "meadow": ((150, 208, 245), (255, 255, 255), (70, 150, 80), (130, 200, 80), (70, 145, 60)),
    "sea": ((200, 232, 245), (255, 225, 120), (90, 140, 190), (35, 115, 185), (135, 205, 235)),
    "night": ((22, 26, 78), (255, 240, 170), (30, 30, 60), (48, 62, 92), (40, 40, 70)),
    "desert": ((252, 205, 150), (240, 105, 60), (60, 130, 80), (232, 180, 95), (205, 142, 68)),
    "snow": ((176, 198, 222), (255, 255, 255), (112, 138, 178), (236, 243, 250), (200, 215, 235)),
    "room": ((226, 188, 170), (250, 245, 235), (206, 158, 146), (150, 98, 66), (112, 68, 44)),
}
SUBJECT_COLOURS: dict[str, Rgb] = {
    "red": (222, 48, 44), "yellow": (250, 196, 30), "purple": (140, 60, 180), "teal": (0, 150, 150),
}  # fmt: skip
HAIR_COLOURS: dict[str, Rgb] = {
    "black": (38, 32, 38), "brown": (110, 66, 36), "blond": (240, 205, 100), "red": (205, 85, 35),
    "grey": (170, 172, 180),
}  # fmt: skip
SKIN_COLOURS: dict[str, Rgb] = {"light": (252, 216, 190), "tan": (222, 165, 118), "dark": (138, 88, 60)}


def render(factors: Factors) -> np.ndarray:
    """The picture: [64, 64, 3] uint8."""
    return STYLES[factors.style](draw(factors), _palette(factors))


def render_cut_out(factors: Factors, square: Rgb) -> np.ndarray:
    """The subject alone, large, on a square of one colour: [64, 64, 3] uint8."""
    regions = draw_cut_out(factors)
    picture = STYLES[factors.style](regions, _palette(factors))
    share = _shrink((regions == Region.EMPTY)[..., None].astype(np.float32))
    return (share * np.array(square) + (1 - share) * picture).astype(np.uint8)


def _palette(factors: Factors) -> np.ndarray:
    """[22, 3] float32: the colour of each region, 0-255, before the style changes it."""
    main = SUBJECT_COLOURS[factors.colour]
    colours = dict(zip(list(Region)[:5], SCENE_COLOURS[factors.scene], strict=True))
    colours |= {
        Region.SNOW_CAP: (255, 255, 255), Region.PANE: (150, 205, 240), Region.EMPTY: (255, 255, 255),
        Region.MAIN: main,
        Region.LIGHT: (255, 246, 226), Region.DARK: (62, 42, 40), Region.LEAF: (40, 120, 50),
        Region.ACCENT: (90, 190, 250) if factors.colour == "yellow" else (255, 214, 70),
        Region.EYE_WHITE: (255, 255, 255), Region.EYE: (30, 26, 34), Region.MOUTH: (168, 32, 48),
        Region.TEETH: (255, 255, 255), Region.GLASSES: (20, 20, 30), Region.SHIRT: main,
    }  # fmt: skip
    skin, hair = (SKIN_COLOURS["light"], HAIR_COLOURS["black"])
    if factors.subject == PERSON:
        identity = IDENTITIES[factors.identity]
        skin, hair = SKIN_COLOURS[identity.skin], HAIR_COLOURS[identity.hair_colour]
    colours |= {Region.SKIN: skin, Region.HAIR: hair, Region.CHEEK: tuple(round(0.78 * value) for value in skin)}
    return np.array([colours[region] for region in Region], dtype=np.float32)


def _shrink(picture: np.ndarray) -> np.ndarray:
    """[128, 128, C] -> [64, 64, C], each pixel the mean of four."""
    return picture.reshape(SIZE, SCALE, SIZE, SCALE, -1).mean(axis=(1, 3))


def _lift(tone: np.ndarray) -> np.ndarray:
    """Make the subject's regions lighter, so that it stands out of hatching."""
    return np.concatenate([tone[:FIRST_OF_SUBJECT], 0.3 + 0.7 * tone[FIRST_OF_SUBJECT:]])


def _finish(picture: np.ndarray) -> np.ndarray:
    if picture.shape[0] != SIZE:
        picture = _shrink(picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _borders(regions: np.ndarray, width: int = 1) -> np.ndarray:
    """[128, 128] bool: within ``width`` of another region."""
    borders = np.zeros(regions.shape, dtype=bool)
    down, right = regions[1:] != regions[:-1], regions[:, 1:] != regions[:, :-1]
    borders[1:] |= down
    borders[:-1] |= down
    borders[:, 1:] |= right
    borders[:, :-1] |= right
    if width > 1:
        size = 2 * width - 1
        borders = np.asarray(Image.fromarray(borders.astype(np.uint8)).filter(ImageFilter.MaxFilter(size))) > 0
    return borders


def _outline(regions: np.ndarray) -> np.ndarray:
    """[128, 128] bool: the thick outline of the subject as a whole."""
    return _borders((regions >= FIRST_OF_SUBJECT).astype(np.uint8), 2)


SOLID = [Region.EYE, Region.MOUTH, Region.GLASSES]  # EYE: pupils and brows
BARE = [Region.EYE_WHITE, Region.TEETH, Region.CHEEK]  # CHEEK: the nose


def _lines(regions: np.ndarray) -> np.ndarray:
    """[128, 128] bool: the lines between regions, and a face's eyes, brows, mouth and glasses. These are solid
    shapes, and nothing in a face has lines around it, which would be finer than a picture of 64 pixels, and its 64
    latents, can hold. Over hair and beard a solid shape has a line's breadth of its surroundings' border around it."""
    return _borders(np.where(np.isin(regions, SOLID + BARE), Region.SKIN, regions)) | np.isin(regions, SOLID)


def _blur(picture: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)


def _tone(palette: np.ndarray) -> np.ndarray:
    """[22] brightness of each region, 0-1."""
    return palette @ np.array([0.3, 0.59, 0.11], dtype=np.float32) / 255


def _saturate(palette: np.ndarray, amount: float) -> np.ndarray:
    grey = 255 * _tone(palette)[:, None]
    return np.clip(grey + amount * (palette - grey), 0, 255)


@cache
def _page() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every pixel of the page, [128, 128] each."""
    rows, columns = np.mgrid[: SIZE * SCALE, : SIZE * SCALE].astype(np.float32)
    return rows, columns


@cache
def _edge() -> np.ndarray:
    """[128, 128] distance to the edge of the page."""
    rows, columns = _page()
    return np.minimum(np.minimum(rows, columns), SIZE * SCALE - 1 - np.maximum(rows, columns))


def poster(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Flat, loud colours without a line, in a cream frame."""
    flat = _saturate(palette, 1.35)[regions]
    flat[_edge() < 7] = (255, 240, 205)
    return _finish(flat)


def pencil(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Grey strokes on paper: hatched where it is dark, crossed where it is darker."""
    rows, columns = _page()
    tone = _lift(_tone(palette))[regions]
    strokes = ((rows + columns) % 8 < 3) & (tone < 0.72)
    crossed = ((rows - columns) % 8 < 3) & (tone < 0.4)
    ink = np.where(strokes | crossed, 0.55, 0.04) + 0.12 * (1 - tone)
    ink[_outline(regions) | _lines(regions)] = 0.95
    return _finish(np.array([247, 244, 236]) - ink[..., None] * np.array([185, 182, 172]))


def watercolour(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Soft pale washes with darker rims, running out into white paper."""
    pale = 255 - (255 - palette) * 0.62
    wash = _blur(pale[regions], 2.2)
    rim = _blur(_borders(regions)[..., None].repeat(3, axis=2) * 255.0, 1.6) / 255
    wash = wash - 55 * rim
    rows, columns = _page()
    ragged = 10 + 1.2 * np.sin(rows * np.pi / 8) + 1.2 * np.sin(columns * np.pi / 8)
    paper = np.clip((ragged - _edge()) / 5, 0, 1)[..., None]
    return _finish(wash * (1 - paper) + 253 * paper)


def neon(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Glowing outlines on black, and faces of bright shapes."""
    bright = palette + 70
    bright = _saturate(np.clip(bright * 255 / bright.max(axis=1, keepdims=True), 0, 255), 2.2)
    lines = bright[regions] * _lines(regions)[..., None]
    glow = _blur(lines * ~np.isin(regions, SOLID)[..., None], 4)
    return _finish(np.array([8, 4, 20]) + 0.16 * bright[regions] + 1.1 * lines + 1.5 * glow)


def glass(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Stained glass: luminous panes between leads, the background in a lattice of diamonds."""
    rows, columns = _page()
    across, along = (rows + columns) % 16, (rows - columns) % 16
    light = 0.75 + 0.5 * np.sin(across * np.pi / 16) * np.sin(along * np.pi / 16)
    panes = np.clip(_saturate(palette, 1.5)[regions] * light[..., None] + 12, 0, 255)
    lattice = ((across < 2) | (along < 2)) & (regions < FIRST_OF_SUBJECT)
    panes[_outline(regions) | _borders(regions) | lattice] = (14, 12, 18)
    return _finish(panes)


def blueprint(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """White lines on blue squared paper."""
    rows, columns = _page()
    paper = np.where((rows % 16 < 2) | (columns % 16 < 2), 0.2, 0.0)
    ink = np.maximum(paper, 0.22 * (regions >= FIRST_OF_SUBJECT) + 0.2 * (1 - _tone(palette)[regions]))
    ink[_lines(regions)] = 1
    return _finish(np.array([18, 62, 150]) + ink[..., None] * np.array([230, 190, 105]))


@cache
def _dots() -> tuple[np.ndarray, np.ndarray]:
    """Where the dots are ([128, 128] bool), and how each differs in colour ([128, 128, 3])."""
    rows, columns = _page()
    row = rows // 8
    across = columns + 4 * (row % 2)
    inside = (rows % 8 - 3.5) ** 2 + (across % 8 - 3.5) ** 2 < 13
    shift = np.array([[[40, -14, -30], [-28, 8, 40]], [[-14, 34, -28], [30, 26, 30]]])
    return inside, shift[row.astype(int) % 2, (across // 8).astype(int) % 2]


def dots(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Pointillism: dots of many hues on a dark ground."""
    inside, shift = _dots()
    colour = np.clip(_saturate(palette, 1.2)[regions] + 10 + shift, 0, 255)
    return _finish(np.where(inside[..., None], colour, 0.4 * colour + np.array([10, 0, 30])))


def woodcut(regions: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Dark ink on ochre paper, shaded by lines across that swell where it is dark."""
    rows, columns = _page()
    wave = np.abs(((rows + 1.5 * np.sin(columns * np.pi / 8)) % 8) / 4 - 1)
    tone = _lift(_tone(palette))[regions]
    ink = (wave > 1.22 * tone + 0.08) | _outline(regions) | _lines(regions)
    return _finish(np.where(ink[..., None], np.array([52, 24, 14]), np.array([226, 178, 98])))


STYLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "poster": poster, "pencil": pencil, "watercolour": watercolour, "neon": neon,
    "glass": glass, "blueprint": blueprint, "dots": dots, "woodcut": woodcut,
}  # fmt: skip
