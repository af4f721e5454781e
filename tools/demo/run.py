"""`make demo`: the shipped workflows in a real ComfyUI, their pictures on one labelled contact sheet.

With MODELS=/path/to/ComfyUI/models the weights are that folder's, else those of the miniature: small models that
training's own code taught a small drawn world.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tools.host.server import ComfyError, ComfyServer
from tools.setup.install import ROOT

from .graphs import Demo, Picture, api_graph, read_workflow
from .released import released_demo

OUTPUT = ROOT / "output" / "demo"
SHEET = OUTPUT / "contact_sheet.jpg"
LONGEST_S = 3600  # for one picture: 25 steps of real weights without a graphics card
JPEG_QUALITY = 82


def say(text: str, end: str = "\n") -> None:
    """Progress for the person who is waiting."""
    print(f"demo: {text}", end=end, flush=True)


def run(server: ComfyServer, pictures: list[Picture]) -> dict[str, Image.Image]:
    """Every picture in turn, with a line for each: how many of how many, what, and how long it took."""
    made = {}
    for number, picture in enumerate(pictures, start=1):
        say(f"{number:2d}/{len(pictures)}  {picture.name.replace('_', ' '):32s}", end="")
        start = time.monotonic()
        *_, pixels = server.run(picture.graph, timeout=LONGEST_S)  # what is previewed comes before what is saved
        print(f"{time.monotonic() - start:7.1f} s", flush=True)
        made[picture.name] = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    return made


def chosen_demo(folder: Path) -> Demo:
    """On the models that MODELS names, or on the miniature, which goes into ``folder``."""
    models = os.environ.get("MODELS")
    if models:
        return released_demo(Path(models).expanduser().resolve())
    say("writing the miniature's models")
    from .miniature import miniature_demo  # its own imports take seconds

    return miniature_demo(folder)


def make_demo(chosen: Callable[[Path], Demo], target: Path) -> None:
    """Everything from the weights to the sheet; raises ValueError or ComfyError in words for a person."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        demo = chosen(Path(folder))
        say(demo.about)
        say("starting ComfyUI")
        with ComfyServer(models=demo.models) as server:
            for picture in demo.inputs:
                server.upload(picture)
            schemas = server.object_info()
            pictures = demo.planned({name: api_graph(read_workflow(name), schemas) for name in demo.workflows})
            made = run(server, pictures)
        OUTPUT.mkdir(parents=True, exist_ok=True)
        for name, picture in made.items():
            picture.save(OUTPUT / f"{name}.png")
        whole = demo.sheet(made, {picture.name: picture.graph for picture in pictures})
    whole.save(target, quality=JPEG_QUALITY, optimize=True)


def run_demo(chosen: Callable[[Path], Demo] = chosen_demo, target: Path = SHEET) -> None:
    """A demo as a program of its own: what ends it, ends it with a sentence."""
    # A server lives in a session of its own, so no signal to this process ends it; an exception does, on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        make_demo(chosen, target)
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, ComfyError, FileNotFoundError) as error:
        sys.exit(f"demo: {error}")
    say(os.path.relpath(target, ROOT))


if __name__ == "__main__":
    run_demo()
