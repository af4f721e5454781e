"""`make demo`: the shipped workflows in a real ComfyUI, their pictures on one labelled contact sheet.

With MODELS=/path/to/ComfyUI/models the weights are that folder's, else tiny random ones made on the spot.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .comfy_server import ComfyError, ComfyServer, Graph
from .contact_sheet import Cell, Row, contact_sheet
from .demo_graphs import api_graph, text_of, with_inputs, without_adapter
from .demo_models import needed_files, real_names, renamed, tiny_names
from .install import ROOT
from .tiny_models import make_tiny_models

WORKFLOWS, INPUTS, OUTPUT = ROOT / "workflows", ROOT / "workflows" / "inputs", ROOT / "output" / "demo"
SHEET = OUTPUT / "contact_sheet.jpg"
REFERENCE, SCRIBBLE, POSE = (INPUTS / f"{name}.png" for name in ("astronaut", "cottage_scribble", "waving_pose"))
TASKS = ("everything", "style", "composition", "object", "face")
COMBINED = {
    "style_with_scribble_controlnet": "Style + scribble ControlNet",
    "face_with_pose_controlnet": "Face + pose ControlNet",
    "style_with_lora": "Style + LoRA",
}
# All that tiny weights change in the shipped graphs, beside the files' names.
TINY_SETTINGS = {"EmptyLatentImage": {"width": 128, "height": 128}, "KSampler": {"steps": 4}}
LONGEST_S = 3600  # for one picture: 25 steps of real weights without a graphics card
JPEG_QUALITY = 82

RANDOM = "The weights are random (tiny ones made on the spot): the pictures show that every graph runs, and no more."
RANDOM_ADVICE = f"{RANDOM} With real weights: make demo MODELS=/path/to/ComfyUI/models"


@dataclass(frozen=True)
class Picture:
    """A graph to run, and the name of its picture."""

    name: str
    graph: Graph


def say(text: str, end: str = "\n") -> None:
    """Progress for the person who is waiting."""
    print(f"demo: {text}" if end == "\n" else f"demo: {text}", end=end, flush=True)


def shipped_workflows() -> dict[str, dict]:
    """The workflow files that the demo runs, by their stem."""
    return {name: json.loads((WORKFLOWS / f"{name}.json").read_text()) for name in (*TASKS, *COMBINED)}


def planned(graphs: dict[str, Graph]) -> list[Picture]:
    """Each task beside the plain checkpoint with the same prompt and seed, then ControlNets and LoRA."""
    pictures = []
    for name, graph in graphs.items():
        pictures.append(Picture(name, graph))
        if name in TASKS:
            pictures.append(Picture(f"{name}_without", without_adapter(graph)))
    return pictures


def run(server: ComfyServer, pictures: list[Picture]) -> dict[str, Image.Image]:
    """Every picture in turn, with a line for each: how many of how many, what, and how long it took."""
    made = {}
    for number, picture in enumerate(pictures, start=1):
        say(f"{number:2d}/{len(pictures)}  {picture.name.replace('_', ' '):32s}", end="")
        start = time.monotonic()
        (pixels,) = server.run(picture.graph, timeout=LONGEST_S)
        print(f"{time.monotonic() - start:7.1f} s", flush=True)
        made[picture.name] = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    return made


def sheet(made: dict[str, Image.Image], graphs: dict[str, Graph], foot: str) -> Image.Image:
    """The tasks, below each the plain checkpoint, and below those the ControlNet and LoRA graphs."""
    prompts = {name: text_of(graph) for name, graph in graphs.items()}
    reference = Cell(Image.open(REFERENCE), "Reference picture", "Eileen Collins, astronaut. NASA, public domain")
    tasks = [Cell(made[name], task_label(name, graphs[name]), prompts[name]) for name in TASKS]
    plain = [plain_cell(made[name], made[f"{name}_without"]) for name in TASKS]
    scribble, pose, lora = (Cell(made[name], label, prompts[name]) for name, label in COMBINED.items())
    combined = [
        Cell(Image.open(SCRIBBLE), "Scribble", "the hint for the picture at its right"),
        scribble,
        Cell(Image.open(POSE), "Pose", "the hint for the picture at its right"),
        pose,
        lora,
    ]
    (sampler,) = (entry["inputs"] for entry in graphs[TASKS[0]].values() if entry["class_type"] == "KSampler")
    width, height = made[TASKS[0]].size
    settings = f"{width} x {height} pixels, {sampler['steps']} steps, cfg {sampler['cfg']:g}, seed {sampler['seed']}"
    return contact_sheet(
        "IPAdapter-Instruct: one picture, five instructions",
        f"The shipped workflows, run in ComfyUI by make demo: {settings}. Below each picture is its prompt.",
        [
            Row("", "", tasks, left=reference),
            Row(
                "Plain checkpoint",
                "For comparison: the graphs above without our nodes, the same prompts and seeds.",
                plain,
            ),
            Row(
                "With ControlNet and LoRA",
                "The same reference picture. The ControlNet holds a drawing's lines or a figure's pose.",
                combined,
            ),
        ],
        foot,
    )


def task_label(task: str, graph: Graph) -> str:
    """The task, and what the instruction says beside it."""
    (encode,) = (entry["inputs"] for entry in graph.values() if entry["class_type"] == "IPAdapterInstructEncode")
    detail = encode.get("subject") or encode.get("instruction")
    return f"{task.capitalize()}: {detail}" if detail else task.capitalize()


def plain_cell(adapted: Image.Image, plain: Image.Image) -> Cell:
    """The picture without the adapter, and how far the one above is from it: with random weights eyes cannot tell."""
    difference = np.abs(np.asarray(adapted, np.float32) - np.asarray(plain, np.float32)).mean()
    return Cell(plain, "Without the adapter", f"differs from the one above by {difference:.0f} of 255")


@contextmanager
def models_folder() -> Iterator[tuple[Path, bool]]:
    """The models folder, and whether its weights are real; a folder of tiny ones goes when the block ends."""
    chosen = os.environ.get("MODELS")
    if chosen:
        yield Path(chosen).expanduser().resolve(), True
        return
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        yield make_tiny_models(Path(folder)), False


def make_demo() -> None:
    """Everything from the weights to the sheet; raises ValueError or ComfyError in words for a person."""
    workflows = shipped_workflows()
    needed = needed_files(workflows.values())
    with models_folder() as (models, are_real):
        names = real_names(models, needed) if are_real else tiny_names(needed)
        say(f"weights of {models}" if are_real else RANDOM_ADVICE)
        say("starting ComfyUI")
        with ComfyServer(models=models) as server:
            for picture in (REFERENCE, SCRIBBLE, POSE):
                server.upload(picture)
            schemas = server.object_info()
            graphs = {name: renamed(api_graph(workflow, schemas), names) for name, workflow in workflows.items()}
            if not are_real:
                graphs = {name: with_inputs(graph, TINY_SETTINGS) for name, graph in graphs.items()}
            made = run(server, planned(graphs))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, picture in made.items():
        picture.save(OUTPUT / f"{name}.png")
    foot = f"Weights: {', '.join(names.values())}" if are_real else RANDOM
    sheet(made, graphs, foot).save(SHEET, quality=JPEG_QUALITY, optimize=True)


def main() -> None:
    # A server lives in a session of its own, so no signal to this process ends it; an exception does, on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        make_demo()
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, ComfyError) as error:
        sys.exit(f"demo: {error}")
    say(os.path.relpath(SHEET, ROOT))


if __name__ == "__main__":
    main()
