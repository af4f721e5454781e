"""Builds the workflows that the pack ships, from the running host's own schemas.

`python -m tools.workflows` writes workflows/*.json, and a picture of each graph as the page draws it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .comfy_page import ComfyPage, comfy_page
from .comfy_server import ComfyServer
from .hint_pictures import INPUTS, POSE, SCRIBBLE
from .workflow_canvas import PICTURE_HEIGHT, Canvas, Json, Output

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
FIVE_TASKS = ("everything", "style", "composition", "object", "face")
REFERENCE = "astronaut.png"
SIZE, STEPS, CFG = 512, 25, 5.0  # cfg: the text scale of the released weights' reference settings
PICTURE_WIDTH, PICTURE_MARGIN = 1600, 24  # of a graph's picture, in pixels
NEGATIVE = "blurry, low quality, deformed, watermark"

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
ADAPTER = "ip-adapter-instruct-sd15.bin"
VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
SCRIBBLE_NET, POSE_NET = "control_v11p_sd15_scribble_fp16.safetensors", "control_v11p_sd15_openpose_fp16.safetensors"
LORA = "pixel_art_style_sd15.safetensors"

HUB = "https://huggingface.co/{}/resolve/main/{}"
CHECKPOINT_HUB, CONTROL_HUB = (
    "Comfy-Org/stable-diffusion-v1-5-archive",
    "comfyanonymous/ControlNet-v1-1_fp16_safetensors",
)
FILES = f"""\
Put these into ComfyUI's `models` folder, then press **R**.

**checkpoints**
- `{CHECKPOINT}`
- Hugging Face: {CHECKPOINT_HUB}
- or any other SD1.5 checkpoint

**ipadapter_instruct**
- `{ADAPTER}`
- Hugging Face: CiaraRowles/IP-Adapter-Instruct

**clip_vision**
- `{VISION}`
- Hugging Face: h94/IP-Adapter, where it is `models/image_encoder/model.safetensors`: rename it
"""
CONTROL_FILES = f"\n**controlnet**\n- `{{}}`\n- Hugging Face: {CONTROL_HUB}\n"
LORA_FILES = f"\n**loras**\n- any SD1.5 LoRA: choose yours in Load LoRA in place of `{LORA}`\n"
PICTURES = """
**Pictures** are in the pack's folder `workflows/inputs`: *choose file to upload* takes them, or your own.
"""

READING_WIDTH, LOADER_WIDTH, TEXT_WIDTH, NODE_WIDTH, RESULT = 420, 400, 340, 320, 440


class Models(NamedTuple):
    model: Output
    clip: Output
    vae: Output
    adapter: Output
    vision: Output


class Texts(NamedTuple):
    """Both prompts, as the words that Encode Instruction reads and as the conditioning that the sampler reads."""

    prompt: Output
    negative_prompt: Output
    positive: Output
    negative: Output


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

**Try:** your own painting as the reference; own words in *instruction*, such as *borrow the artistic style*.
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
    files = FILES + CONTROL_FILES.format(SCRIBBLE_NET)
    with_controlnet(canvas, about, files, "style", "a cottage beside a tree, mountains behind", SCRIBBLE_NET, SCRIBBLE)


def face_with_pose_controlnet(canvas: Canvas) -> None:
    about = """\
## Face of a picture, pose of a figure
The ControlNet holds the pose while the adapter takes the face of the reference.

The figure is a drawing of OpenPose's joints; preprocessor packs make one from a photograph.
"""
    files = FILES + CONTROL_FILES.format(POSE_NET)
    with_controlnet(canvas, about, files, "face", "a woman waving on a beach, photograph", POSE_NET, POSE)


def style_with_lora(canvas: Canvas) -> None:
    about = """\
## Style with a LoRA
A LoRA changes the model and the CLIP, the adapter joins in after it. Connect Encode Instruction to the LoRA's CLIP or \
to the checkpoint's: both work, the checkpoint's reads the instruction as it was trained.
"""
    notes(canvas, about, FILES + LORA_FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_models(canvas)
    image = reference_picture(canvas)
    with canvas.column("LoRA", "control", TEXT_WIDTH):
        lora = canvas.node(
            "LoraLoader", model=models.model, clip=models.clip, lora_name=LORA, strength_model=0.8, strength_clip=0.8
        )
    texts = write_prompts(canvas, lora["CLIP"], "pixel art of a small harbour town at dusk", below=True)
    models = models._replace(model=lora["MODEL"])
    adapted = take_from_picture(canvas, models, texts, image, "style")
    make_picture(canvas, models, adapted, texts.positive, texts.negative, "style_with_lora")


def one_picture_five_instructions(canvas: Canvas) -> None:
    about = """\
## One picture, five instructions
The same reference, prompt and seed five times: only the task differs. This shows at a glance what each of them takes.

**Try:** one prompt at a time, for example one that names another subject or another place.
"""
    notes(canvas, about, FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_models(canvas)
    image = reference_picture(canvas)
    with canvas.column("Prompts, typed once", "text", TEXT_WIDTH):
        texts = place_prompts(canvas, models.clip, "a woman reading in a library, oil painting")
        latent = canvas.node("EmptyLatentImage", width=SIZE, height=SIZE).only
    canvas.space(120)
    for task in FIVE_TASKS:
        with canvas.row(task.capitalize(), "adapter"):
            subject = "orange space suit" if task == "object" else ""
            adapted = apply_instruction(canvas, models, texts, task, subject, image, NODE_WIDTH)
            sampled = sample(canvas, adapted, texts.positive, texts.negative, latent, "fixed", NODE_WIDTH)
            decoded = canvas.node("VAEDecode", wide=200, samples=sampled, vae=models.vae)
            save(canvas, decoded.only, f"five_instructions_{task}", NODE_WIDTH)


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
}


def one_task(canvas: Canvas, about: str, task: str, prompt: str, subject: str = "") -> None:
    """The plain graph of one task."""
    notes(canvas, about, FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_models(canvas)
    image = reference_picture(canvas)
    texts = write_prompts(canvas, models.clip, prompt)
    adapted = take_from_picture(canvas, models, texts, image, task, subject)
    make_picture(canvas, models, adapted, texts.positive, texts.negative, task)


def with_controlnet(canvas: Canvas, about: str, files: str, task: str, prompt: str, net: str, hint: str) -> None:
    """The graph of one task with a ControlNet on its prompts."""
    notes(canvas, about, files + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_models(canvas)
        loaded_net = canvas.node(
            "ControlNetLoader", models=on_hub(net, "controlnet", CONTROL_HUB), control_net_name=net
        )
    image = reference_picture(canvas)
    texts = write_prompts(canvas, models.clip, prompt)
    adapted = take_from_picture(canvas, models, texts, image, task)
    with canvas.column("What to hold on to", "control", NODE_WIDTH):
        picture = load_picture(canvas, "Drawing" if hint == SCRIBBLE else "Pose", hint)
        if hint == SCRIBBLE:
            picture = canvas.node("ImageInvert", image=picture).only
        controlled = canvas.node(
            "ControlNetApplyAdvanced",
            positive=texts.positive,
            negative=texts.negative,
            control_net=loaded_net.only,
            image=picture,
            strength=0.8,
        )
    make_picture(canvas, models, adapted, controlled["positive"], controlled["negative"], f"{task}_with_controlnet")


def notes(canvas: Canvas, about: str, files: str) -> None:
    with canvas.column("Read me", "text", READING_WIDTH):
        canvas.note("What this does", about)
        canvas.note("Files", files)


def load_models(canvas: Canvas) -> Models:
    checkpoint = canvas.node(
        "CheckpointLoaderSimple", models=on_hub(CHECKPOINT, "checkpoints", CHECKPOINT_HUB), ckpt_name=CHECKPOINT
    )
    adapter = canvas.node("IPAdapterInstructModelLoader", adapter_name=ADAPTER)
    encoder = on_hub(VISION, "clip_vision", "h94/IP-Adapter", "models/image_encoder/model.safetensors")
    vision = canvas.node("CLIPVisionLoader", models=encoder, clip_name=VISION)
    return Models(checkpoint["MODEL"], checkpoint["CLIP"], checkpoint["VAE"], adapter.only, vision.only)


def on_hub(name: str, folder: str, repository: str, path: str = "") -> Json:
    """What the page needs to offer a missing file; it takes .safetensors only, so not the released adapter."""
    return {"name": name, "url": HUB.format(repository, path or name), "directory": folder}


def write_prompts(canvas: Canvas, clip: Output, prompt: str, below: bool = False) -> Texts:
    with canvas.column("Prompts, typed once", "text", TEXT_WIDTH, below):
        return place_prompts(canvas, clip, prompt)


def place_prompts(canvas: Canvas, clip: Output, prompt: str) -> Texts:
    """Each prompt is one text for both of its readers: the text encoder and Encode Instruction."""
    words = canvas.node("PrimitiveStringMultiline", title="Prompt", tall=120, value=prompt).only
    unwanted = canvas.node("PrimitiveStringMultiline", title="Negative prompt", tall=120, value=NEGATIVE).only
    positive = canvas.node("CLIPTextEncode", title="Encode prompt", collapsed=True, clip=clip, text=words)
    negative = canvas.node("CLIPTextEncode", title="Encode negative", collapsed=True, clip=clip, text=unwanted)
    return Texts(words, unwanted, positive.only, negative.only)


def load_picture(canvas: Canvas, title: str, name: str) -> Output:
    return canvas.node("LoadImage", title=title, tall=PICTURE_HEIGHT, image=name)["IMAGE"]


def reference_picture(canvas: Canvas) -> Output:
    with canvas.column("Reference picture", "adapter", LOADER_WIDTH, below=True):
        return load_picture(canvas, "Reference picture", REFERENCE)


def take_from_picture(
    canvas: Canvas, models: Models, texts: Texts, image: Output, task: str, subject: str = ""
) -> Output:
    """What to take from the reference picture; returns the MODEL that follows it."""
    with canvas.column("What to take from it", "adapter", NODE_WIDTH):
        return apply_instruction(canvas, models, texts, task, subject, image)


def apply_instruction(
    canvas: Canvas, models: Models, texts: Texts, task: str, subject: str, image: Output, wide: int = 0
) -> Output:
    instruction = canvas.node(
        "IPAdapterInstructEncode",
        wide=wide,
        adapter=models.adapter,
        clip=models.clip,
        task=task,
        subject=subject,
        prompt=texts.prompt,
        negative_prompt=texts.negative_prompt,
    )
    applied = canvas.node(
        "IPAdapterInstructApply",
        wide=wide,
        model=models.model,
        adapter=models.adapter,
        instruction=instruction.only,
        clip_vision=models.vision,
        image=image,
    )
    return applied.only


def make_picture(
    canvas: Canvas, models: Models, model: Output, positive: Output, negative: Output, prefix: str
) -> None:
    with canvas.column("Sampling", "picture", NODE_WIDTH):
        latent = canvas.node("EmptyLatentImage", width=SIZE, height=SIZE).only
        sampled = sample(canvas, model, positive, negative, latent, after="randomize")
        decoded = canvas.node("VAEDecode", samples=sampled, vae=models.vae)
    with canvas.column("Result", "picture", RESULT):
        save(canvas, decoded.only, prefix, tall=RESULT)


def sample(
    canvas: Canvas, model: Output, positive: Output, negative: Output, latent: Output, after: str, wide: int = 0
) -> Output:
    """The host's own sampler; ``after`` says what becomes of the seed once a picture is made."""
    return canvas.node(
        "KSampler",
        wide=wide,
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=1,
        control_after_generate=after,
        steps=STEPS,
        cfg=CFG,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    ).only


def save(canvas: Canvas, images: Output, prefix: str, wide: int = 0, tall: int = PICTURE_HEIGHT) -> None:
    canvas.node("SaveImage", wide=wide, tall=tall, images=images, filename_prefix=prefix)


def build(schemas: Json) -> dict[str, Json]:
    """Every shipped workflow by its file's stem, for a host's /object_info."""
    workflows = {}
    for name, draw in GRAPHS.items():
        canvas = Canvas(name, schemas)
        draw(canvas)
        workflows[name] = canvas.workflow()
    return workflows


def named_files(folder: Path) -> Path:
    """A models folder that lists every file which the workflows name; they are empty, for the page shows names only."""
    places = {"checkpoints": [CHECKPOINT], "ipadapter_instruct": [ADAPTER], "clip_vision": [VISION]}
    places |= {"controlnet": [SCRIBBLE_NET, POSE_NET], "loras": [LORA]}
    for place, names in places.items():
        (folder / place).mkdir(parents=True)
        for name in names:
            (folder / place / name).touch()
    return folder


def frame(workflow: Json) -> tuple[int, int]:
    """Width and height of the area that its groups cover."""
    boxes = [group["bounding"] for group in workflow["groups"]]
    return max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)


def take_picture(page: ComfyPage, workflow: Json, path: Path) -> None:
    """At the page's full scale first, since it leaves texts out at a smaller one."""
    width, height = frame(workflow)
    page.page.set_viewport_size({"width": width + 2 * PICTURE_MARGIN, "height": height + 2 * PICTURE_MARGIN})
    with tempfile.TemporaryDirectory() as folder:
        picture = Image.open(page.graph_picture(Path(folder) / "graph.png", PICTURE_MARGIN)).convert("RGB")
    picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH), Image.Resampling.LANCZOS)
    picture.save(path, quality=85, optimize=True)


def main() -> None:
    """Write the workflows, and a picture of each graph as the page draws it."""
    with tempfile.TemporaryDirectory() as folder, ComfyServer(models=named_files(Path(folder) / "models")) as server:
        for picture in INPUTS.glob("*.png"):
            server.upload(picture)
        workflows = build(server.object_info())
        with comfy_page(server) as page:
            for name, workflow in workflows.items():
                (WORKFLOWS / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
                page.clear()  # so that the wait for this graph's nodes is not over at once
                page.load(workflow)
                take_picture(page, workflow, WORKFLOWS / f"{name}.jpg")


if __name__ == "__main__":
    main()
