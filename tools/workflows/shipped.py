"""Builds the workflows that the pack ships, from the running host's own schemas.

`python -m tools.workflows.shipped` writes workflows/*.json, and the blueprints, subgraphs/*.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tools.host.server import ComfyServer

from .all_instructions import one_picture_five_instructions, own_adapter_five_instructions
from .blueprints import build_blueprints
from .canvas import Canvas, Json
from .files import (
    CONTROL_FILES,
    PICTURES,
    POSE_NET,
    SCRIBBLE_NET,
    SD3_CANNY_FILES,
    SD3_CANNY_HUB,
    SD3_CANNY_NET,
    SD3_FILES,
    on_hub,
)
from .hint_pictures import POSE, SCRIBBLE
from .parts import (
    LOADER_WIDTH,
    NODE_WIDTH,
    OWN,
    SD3,
    Adapted,
    apply_instruction,
    load_picture,
    make_picture,
    notes,
    one_task,
    reference_picture,
    take_from_picture,
    typed_once,
    with_controlnet,
    with_lora,
)
from .references import (
    inpainting_with_mask,
    not_this_style,
    saved_reference,
    two_references_two_roles,
    upscale_pass,
    where_it_looked,
)

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SUBGRAPHS = WORKFLOWS.parent / "subgraphs"


def everything(canvas: Canvas) -> None:
    about = """\
## Everything: variations of a picture
The whole picture is recreated: subject, layout and style. The prompt nudges it.

**Try:** another seed; a lower *weight* (0.5) to give the prompt more room.
"""
    one_task(canvas, about, "everything", "portrait of an astronaut in front of a space shuttle, photograph")


def style(canvas: Canvas) -> None:
    about = """\
## Style: paint something else in the same manner
Only the look is taken, so the prompt names another subject. Paintings and drawings show it best.

**Try:** your own painting as the reference; an *own wording*, such as *borrow the artistic style*.
"""
    one_task(canvas, about, "style", "a red fox sitting in a forest")


def composition(canvas: Canvas) -> None:
    about = """\
## Composition: the same layout, other things in it
Where things stand is taken; what they are and how they look comes from the prompt. Guidance *auto* is three-way here: \
text, instruction and picture have a scale each, at some cost in time.

**Try:** a lower *weight* if the layout leaves the prompt too little room.
"""
    one_task(canvas, about, "composition", "a king in a golden robe before a castle, oil painting")


def object_(canvas: Canvas) -> None:
    about = """\
## Object: put a thing into a new scene
Say in *subject* what the thing is: it takes the place of the word *object* in the instruction. The prompt tells where \
it should be.

**Try:** *instruct_scale* 3 with guidance *three-way* if the thing is lost.
"""
    prompt = "an orange space suit in the window of a small shop, at night"
    one_task(canvas, about, "object", prompt, subject="orange space suit")


def face(canvas: Canvas) -> None:
    about = """\
## Face: the same person in a new scene
The face is taken; the prompt tells what the person wears and does. A reference in which the face is large works best: \
only the middle square of the picture is read.

**Try:** crop the reference to the face.
"""
    one_task(canvas, about, "face", "a woman cooking in a restaurant kitchen, photograph")


def style_with_scribble_controlnet(canvas: Canvas) -> None:
    about = """\
## Style of a picture, lines of a scribble
The ControlNet holds the drawing's lines while the adapter takes the reference's style.

The drawing is black on white, as people draw; the ControlNet reads white on black, so *Invert Image* turns it round. \
Leave that out if yours is white on black.
"""
    files = CONTROL_FILES.format(SCRIBBLE_NET)
    with_controlnet(canvas, about, files, "style", "a cottage beside a tree, mountains behind", SCRIBBLE_NET, SCRIBBLE)


def face_with_pose_controlnet(canvas: Canvas) -> None:
    about = """\
## Face of a picture, pose of a figure
The ControlNet holds the pose while the adapter takes the face of the reference.

The figure is a drawing of OpenPose's joints; preprocessor packs make one from a photograph.
"""
    files = CONTROL_FILES.format(POSE_NET)
    with_controlnet(canvas, about, files, "face", "a woman waving on a beach, photograph", POSE_NET, POSE)


def style_with_lora(canvas: Canvas) -> None:
    about = """\
## Style with a LoRA
A LoRA changes the model and the CLIP, the adapter joins in after it. Connect Encode Instruction to the LoRA's CLIP or \
to the checkpoint's: both work, the checkpoint's reads the instruction as it was trained.
"""
    with_lora(canvas, about, "style", "pixel art of a small harbour town at dusk")


def own_adapter_style_with_scribble_controlnet(canvas: Canvas) -> None:
    about = """\
## Your own adapter: style of a picture, lines of a scribble
For an adapter that you trained as the paper did: one OpenCLIP model reads both the picture and the instruction. The \
ControlNet holds the drawing's lines while the adapter takes the reference's style.

The drawing is black on white; the ControlNet reads white on black, so *Invert Image* turns it round.
"""
    prompt, files = "a cottage beside a tree, mountains behind", CONTROL_FILES.format(SCRIBBLE_NET)
    with_controlnet(canvas, about, files, "style", prompt, SCRIBBLE_NET, SCRIBBLE, OWN)


def own_adapter_composition_with_lora(canvas: Canvas) -> None:
    about = """\
## Your own adapter: composition of a picture, look of a LoRA
For an adapter that you trained as the paper did: one OpenCLIP model reads both the picture and the instruction, so \
that no LoRA changes these. The LoRA brings the look, the adapter takes only the layout from the reference.
"""
    with_lora(canvas, about, "composition", "pixel art of a knight before a castle", OWN)


def sd3_style(canvas: Canvas) -> None:
    about = """\
## SD3: paint something else in the same manner
The released SD3 adapter on SD3 medium, with the settings of its authors: *euler*, *normal*, cfg 6, 1024 x 1024.

**Try:** another task. Composition, pose and face are guided three ways, which costs no more here than simple \
guidance: with cfg and instruct scale at 6 and the image scale at 1, two evaluations a step are all that count.
"""
    one_task(canvas, about, "style", "a red fox sitting in a forest", adapter=SD3, prefix="sd3_style")


def sd3_style_and_composition_with_canny_controlnet(canvas: Canvas) -> None:
    about = """\
## SD3: two references and a ControlNet
Two Apply nodes in a chain: the style of one picture, the composition of another. Each has its own instruction, weight \
and range. The ControlNet holds the lines of a drawing; it reads white lines on black, so *Invert Image* turns the \
drawing round, and it needs the VAE.

**Try:** other pictures of your own; a lower *weight* on the second.
"""
    notes(canvas, about, SD3_FILES + SD3_CANNY_FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = SD3.load(canvas)
        canny = on_hub(SD3_CANNY_NET, "controlnet", SD3_CANNY_HUB, "diffusion_pytorch_model.safetensors")
        net = canvas.node("ControlNetLoader", models=canny, control_net_name=SD3_CANNY_NET)
    first = reference_picture(canvas)
    prompts = typed_once(canvas, "a cottage beside a tree, mountains behind")
    styled = take_from_picture(canvas, models, prompts, first, "style")
    with canvas.column("Second reference", "adapter", NODE_WIDTH):
        second = load_picture(canvas, "Second reference", POSE)
        chained = models._replace(model=styled.model)
        adapted = apply_instruction(canvas, chained, prompts, "composition", "", second)
    with canvas.column("What to hold on to", "control", NODE_WIDTH):
        drawing = canvas.node("ImageInvert", image=load_picture(canvas, "Drawing", SCRIBBLE)).only
        controlled = canvas.node(
            "ControlNetApplyAdvanced",
            positive=styled.positive,
            negative=styled.negative,
            control_net=net.only,
            image=drawing,
            vae=models.vae,
            strength=0.7,
        )
    held = Adapted(adapted.model, controlled["positive"], controlled["negative"])
    make_picture(canvas, models, held, "sd3_chain", SD3.sampling)


GRAPHS: dict[str, Callable[[Canvas], None]] = {
    "everything": everything,
    "style": style,
    "composition": composition,
    "object": object_,
    "face": face,
    "style_with_scribble_controlnet": style_with_scribble_controlnet,
    "face_with_pose_controlnet": face_with_pose_controlnet,
    "style_with_lora": style_with_lora,
    "one_picture_five_instructions": one_picture_five_instructions,
    "sd3_style": sd3_style,
    "sd3_style_and_composition_with_canny_controlnet": sd3_style_and_composition_with_canny_controlnet,
    "two_references_two_roles": two_references_two_roles,
    "not_this_style": not_this_style,
    "saved_reference": saved_reference,
    "where_it_looked": where_it_looked,
    "inpainting_with_mask": inpainting_with_mask,
    "upscale_pass": upscale_pass,
    "own_adapter_five_instructions": own_adapter_five_instructions,
    "own_adapter_style_with_scribble_controlnet": own_adapter_style_with_scribble_controlnet,
    "own_adapter_composition_with_lora": own_adapter_composition_with_lora,
}


def build(schemas: Json) -> dict[str, Json]:
    """Every shipped workflow by its file's stem, for a host's /object_info."""
    workflows = {}
    for name, draw in GRAPHS.items():
        canvas = Canvas(name, schemas)
        draw(canvas)
        workflows[name] = canvas.workflow()
    return workflows


def index(workflows: dict[str, Json]) -> str:
    """A page of all workflows with titles and descriptions, which the page's template browser has no place for."""
    lines = [
        "# Workflows",
        "",
        "ComfyUI lists them among its templates, by the names of their files.",
        "",
        "| | |",
        "|---|---|",
    ]
    for name, workflow in workflows.items():
        note = next(node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
        title, about, *_ = note["widgets_values"][0].splitlines()
        lines.append(
            f'| [<img src="{name}.jpg" width="320">]({name}.json) | **{title.strip("# ")}**<br>`{name}`<br>{about} |'
        )
    return "\n".join(lines) + "\n"


def write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    with ComfyServer() as server:
        schemas = server.object_info()
    workflows = build(schemas)
    (WORKFLOWS / "README.md").write_text(index(workflows))
    for folder, files in ((WORKFLOWS, workflows), (SUBGRAPHS, build_blueprints(schemas))):
        for name, content in files.items():
            write(folder / f"{name}.json", content)


if __name__ == "__main__":
    main()
