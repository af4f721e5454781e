"""The demo on the models of one's own ComfyUI: the workflows for the released weights beside the plain checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tools.host.graphs import Graph
from tools.workflows.hint_pictures import INPUTS

from .contact_sheet import Cell, Row, contact_sheet
from .graphs import Demo, Picture, read_workflow, renamed, text_of, without_adapter
from .models import needed_files, real_names

REFERENCE, SCRIBBLE, POSE = (INPUTS / f"{name}.png" for name in ("astronaut", "cottage_scribble", "waving_pose"))
TASKS = ("everything", "style", "composition", "object", "face")
COMBINED = {
    "style_with_scribble_controlnet": "Style + scribble ControlNet",
    "face_with_pose_controlnet": "Face + pose ControlNet",
    "style_with_lora": "Style + LoRA",
}


def released_demo(models: Path) -> Demo:
    """The demo on a ComfyUI models folder; raises ValueError where a file is missing."""
    workflows = (*TASKS, *COMBINED)
    names = real_names(models, needed_files(map(read_workflow, workflows)))
    return Demo(
        about=f"weights of {models}",
        models=models,
        workflows=workflows,
        inputs=[REFERENCE, SCRIBBLE, POSE],
        planned=lambda graphs: planned(renamed(graphs, names)),
        sheet=partial(sheet, foot=f"Weights: {', '.join(names.values())}"),
    )


def planned(graphs: dict[str, Graph]) -> list[Picture]:
    """Each task beside the plain checkpoint with the same prompt and seed, then ControlNets and LoRA."""
    pictures = []
    for name, graph in graphs.items():
        pictures.append(Picture(name, graph))
        if name in TASKS:
            pictures.append(Picture(f"{name}_without", without_adapter(graph)))
    return pictures


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
    """The picture without the adapter, and how far the one above is from it: eyes may not tell."""
    difference = np.abs(np.asarray(adapted, np.float32) - np.asarray(plain, np.float32)).mean()
    return Cell(plain, "Without the adapter", f"differs from the one above by {difference:.0f} of 255")
