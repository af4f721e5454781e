"""Draws the registry's banner from the demo's pictures: `make demo`, then `.venv/bin/python -m tools.demo.banner`.

One picture of the miniature, and what each instruction takes from it.
"""

from __future__ import annotations

from ipadapter_instruct_core.tasks import Task, phrase
from PIL import Image, ImageDraw, ImageFont
from tools.setup.install import ROOT

from .conditions import BOAT
from .run import OUTPUT

BANNER = ROOT / "web" / "banner.png"
SIZE = (1260, 540)  # 21 : 9, as the registry shows it
SHOWN = BOAT
TASKS = ("style", "composition", "object")
PAPER, INK, GREY, GOLD = "#22262e", "#f2ead8", "#a9adb6", "#e8a33d"  # the icon's own
SUBTITLE = "Give a picture, and say in words what to take from it."
MARGIN, GAP, PICTURE, TITLE, LINE, LABEL = 60, 38, 256, 60, 26, 24  # in pixels


def draw() -> Image.Image:
    banner = Image.new("RGB", SIZE, PAPER)
    pen = ImageDraw.Draw(banner)
    pen.text((MARGIN, 44), "IPAdapter-Instruct", INK, ImageFont.load_default(TITLE))
    pen.text((MARGIN, 122), SUBTITLE, GREY, ImageFont.load_default(LINE))
    made = [Image.open(OUTPUT / f"{SHOWN.name}_{task}.png") for task in TASKS]
    words = [f"“{phrase(Task(task), SHOWN.factors.subject)}”" for task in TASKS]
    for place, (picture, label) in enumerate(zip([SHOWN.picture, *made], ["the picture", *words], strict=True)):
        left, top = MARGIN + place * (PICTURE + GAP), 192
        # Every pixel a square: a smooth picture would hide how small it is.
        banner.paste(picture.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (left, top))
        pen.text((left, top + PICTURE + 18), label, GOLD if place else INK, ImageFont.load_default(LABEL))
    return banner


def main() -> None:
    draw().save(BANNER, optimize=True)


if __name__ == "__main__":
    main()
