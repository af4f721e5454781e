"""The shipped workflows around references as things of their own; see `workflows`."""

from __future__ import annotations

from typing import Any

from .all_instructions import all_tasks
from .canvas import PICTURE_HEIGHT, Canvas, Output
from .files import FILES, PICTURES
from .hint_pictures import SCRIBBLE
from .parts import (
    LOADER_WIDTH,
    NEGATIVE,
    NODE_WIDTH,
    REFERENCE,
    RESULT,
    SIZE,
    TEXT_WIDTH,
    Adapted,
    Models,
    apply_instruction,
    encode_instruction,
    load_picture,
    load_released,
    make_picture,
    notes,
    reference_picture,
    sample,
    save,
    typed_once,
)

PORTRAIT = "a woman reading in a library, oil painting"


def two_references_two_roles(canvas: Canvas) -> None:
    about = """\
## Two references, two roles
The face of one picture and the composition of another, combined at one strength. *Combine References* gives each its \
share of the attention; the first decides on the task's strength and guidance.

**Try:** other weights; *mean* for two references with the same task; a chain of two Apply nodes, where each keeps its \
full strength.
"""
    models, image = start(canvas, about)
    prompts = typed_once(canvas, PORTRAIT)
    with canvas.column("Second picture", "adapter", LOADER_WIDTH, below=True):
        second = load_picture(canvas, "Composition of this", SCRIBBLE)
    with canvas.column("First role", "adapter", TEXT_WIDTH):
        face = encode_instruction(canvas, models, prompts, "face")
        first = encode(canvas, models, face["instruction"], image)
    with canvas.column("Second role", "adapter", TEXT_WIDTH):
        layout = encode_instruction(canvas, models, prompts, "composition")
        other = encode(canvas, models, layout["instruction"], second)
    with canvas.column("Both", "adapter", NODE_WIDTH):
        both = canvas.node("IPAdapterInstructCombineReferences", reference_1=first, reference_2=other).only
        applied = apply_reference(canvas, models, both)
    make_picture(canvas, models, Adapted(applied, face["positive"], face["negative"]), "two_references")


def not_this_style(canvas: Canvas) -> None:
    about = """\
## Everything of a picture, but not its style
The reference gives everything; the same picture, under the instruction *style*, is what to keep away from. So the \
prompt's own style comes through.

**Try:** a third picture as the negative reference, in the style that you are tired of.
"""
    models, image = start(canvas, about)
    prompts = typed_once(canvas, "portrait of an astronaut in front of a space shuttle, woodcut")
    with canvas.column("What to take", "adapter", TEXT_WIDTH):
        wanted = encode_instruction(canvas, models, prompts, "everything")
        reference = encode(canvas, models, wanted["instruction"], image)
    with canvas.column("What to keep away from", "adapter", TEXT_WIDTH):
        unwanted = encode_instruction(canvas, models, prompts, "style")
        away = encode(canvas, models, unwanted["instruction"], image)
    with canvas.column("Apply", "adapter", NODE_WIDTH):
        applied = apply_reference(canvas, models, reference, negative_reference=away)
    make_picture(canvas, models, Adapted(applied, wanted["positive"], wanted["negative"]), "not_this_style")


def saved_reference(canvas: Canvas) -> None:
    about = """\
## A look for later
The style of the picture is kept in a small file of *models/ipadapter_instruct_references*. From then on put *Load \
Reference* in place of *Encode Reference*: it needs neither the picture nor Load CLIP Vision, only the same adapter.
"""
    models, image = start(canvas, about)
    with canvas.column("What to take, and the prompts", "adapter", TEXT_WIDTH):
        words = encode_instruction(canvas, models, ("a red fox sitting in a forest", NEGATIVE), "style")
        reference = encode(canvas, models, words["instruction"], image)
    with canvas.column("Keep it, and apply it", "adapter", NODE_WIDTH):
        canvas.node("IPAdapterInstructSaveReference", reference=reference, filename_prefix="astronaut_style")
        applied = apply_reference(canvas, models, reference)
    make_picture(canvas, models, Adapted(applied, words["positive"], words["negative"]), "saved_reference")


def where_it_looked(canvas: Canvas) -> None:
    about = """\
## Where it looked
What the adapter's tokens attended to in the reference under each instruction, all on one scale. No picture is made: \
it takes seconds.

**Try:** *difference to everything*; another crop by *Prepare Reference*.
"""
    models, image = start(canvas, about)
    with canvas.column("All instructions", "adapter", TEXT_WIDTH):
        tasks = all_tasks(canvas, models, ("", ""))
    with canvas.column("Which square is read", "adapter", NODE_WIDTH):
        square = canvas.node("IPAdapterInstructPrepareReference", tall=3 * PICTURE_HEIGHT // 2, image=image).only
    with canvas.column("Where it looked", "picture", 2 * RESULT):
        looked = canvas.node(
            "IPAdapterInstructShowAttention",
            adapter=models.adapter,
            instruction=tasks["instruction"],
            clip_vision=models.vision,
            image=square,
        )
        save(canvas, looked.only, "where_it_looked", tall=RESULT)


def inpainting_with_mask(canvas: Canvas) -> None:
    about = """\
## Inpainting with a mask
Only the white of the mask is painted anew, and only there does the adapter act. Open the picture's mask editor (right \
click on *Picture to change*) and paint what is to be replaced.

**Try:** *object* with another picture as the reference; a *denoise* below 1 to keep more of what was there.
"""
    models, image = start(canvas, about)
    with canvas.column("Picture to change", "control", LOADER_WIDTH):
        changed = canvas.node("LoadImage", title="Picture to change", tall=PICTURE_HEIGHT, image=REFERENCE)
    with canvas.column("What to take, and the prompts", "adapter", TEXT_WIDTH):
        words = encode_instruction(canvas, models, ("a window with a view of the sea", NEGATIVE), "style")
        reference = encode(canvas, models, words["instruction"], image)
        applied = apply_reference(canvas, models, reference, mask=changed["MASK"])
    with canvas.column("Sampling", "picture", NODE_WIDTH):
        latent = canvas.node(
            "VAEEncodeForInpaint", pixels=changed["IMAGE"], vae=models.vae, mask=changed["MASK"], grow_mask_by=6
        ).only
        sampled = sample(canvas, Adapted(applied, words["positive"], words["negative"]), latent, after="randomize")
        decoded = canvas.node("VAEDecode", samples=sampled, vae=models.vae)
    with canvas.column("Result", "picture", RESULT):
        save(canvas, decoded.only, "inpainting", tall=RESULT)


def upscale_pass(canvas: Canvas) -> None:
    about = """\
## An upscale pass with the same reference
The picture is made small, enlarged as a latent, and sampled again with half of the noise, by the same MODEL: the \
reference holds in both passes.
"""
    models, image = start(canvas, about)
    with canvas.column("What to take, and the prompts", "adapter", TEXT_WIDTH):
        prompts = ("a red fox sitting in a forest", NEGATIVE)
        adapted = apply_instruction(canvas, models, prompts, "style", "", image)
    with canvas.column("First pass", "picture", NODE_WIDTH):
        latent = canvas.node("EmptyLatentImage", width=SIZE, height=SIZE).only
        first = sample(canvas, adapted, latent, after="randomize")
        enlarged = canvas.node("LatentUpscaleBy", samples=first, upscale_method="bislerp", scale_by=1.5).only
    with canvas.column("Second pass", "picture", NODE_WIDTH):
        second = sample(canvas, adapted, enlarged, after="randomize", denoise=0.5)
        decoded = canvas.node("VAEDecode", samples=second, vae=models.vae)
    with canvas.column("Result", "picture", RESULT):
        save(canvas, decoded.only, "upscaled", tall=RESULT)


def start(canvas: Canvas, about: str) -> tuple[Models, Output]:
    """The notes, what loads the models, and the reference picture."""
    notes(canvas, about, FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_released(canvas)
    return models, reference_picture(canvas)


def encode(canvas: Canvas, models: Models, words: Output, image: Output) -> Output:
    return canvas.node(
        "IPAdapterInstructEncodeReference",
        adapter=models.adapter,
        instruction=words,
        clip_vision=models.vision,
        image=image,
    ).only


def apply_reference(canvas: Canvas, models: Models, reference: Output, **more: Any) -> Output:
    return canvas.node(
        "IPAdapterInstructApply", model=models.model, adapter=models.adapter, reference=reference, **more
    ).only
