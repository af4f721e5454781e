"""The graphs of all instructions at once: a lane of nodes that run once for each, and one labelled sheet."""

from __future__ import annotations

from .canvas import Canvas, Node, Output
from .files import FILES, OWN_FILES, PICTURES, PLAIN_ADAPTER, PLAIN_FILES
from .parts import (
    LOADER_WIDTH,
    NEGATIVE,
    NODE_WIDTH,
    RESULT,
    SIZE,
    TEXT_WIDTH,
    Adapted,
    Models,
    Prompts,
    apply_picture,
    encode_instruction,
    load_own,
    load_released,
    notes,
    reference_picture,
    sample,
    save,
    typed_once,
)

FIVE_PROMPT, FIVE_SUBJECT = "a woman reading in a library, oil painting", "orange space suit"


def one_picture_five_instructions(canvas: Canvas) -> None:
    about = """\
## One picture, five instructions
The same reference, prompt and seed five times: only the task differs. *All Tasks* gives a list of instructions, and \
the nodes after it run once for each. This shows at a glance what each of them takes.

**Try:** other ticks, a wording of your own in a line, a prompt that names another subject or another place.
"""
    notes(canvas, about, FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_released(canvas)
    image = reference_picture(canvas)
    with canvas.column("All instructions", "adapter", TEXT_WIDTH):
        tasks = all_tasks(canvas, models, (FIVE_PROMPT, NEGATIVE))
    with canvas.column("Once for each", "adapter", NODE_WIDTH):
        adapted = apply_picture(canvas, models, tasks, image)
        latent = canvas.node("EmptyLatentImage", width=SIZE, height=SIZE).only
    with canvas.column("Sampling", "picture", NODE_WIDTH):
        pictures = sample_fixed(canvas, models, adapted, latent)
    with canvas.column("Result", "picture", 2 * RESULT):
        save(canvas, labelled(canvas, pictures, tasks, image), "five_instructions", tall=RESULT)


def all_tasks(canvas: Canvas, models: Models, prompts: Prompts) -> Node:
    return canvas.node(
        "IPAdapterInstructAllTasks",
        subject=FIVE_SUBJECT,
        prompt=prompts[0],
        negative_prompt=prompts[1],
        **models.readers,
    )


def sample_fixed(canvas: Canvas, models: Models, adapted: Adapted, latent: Output) -> Output:
    sampled = sample(canvas, adapted, latent, "fixed")
    return canvas.node("VAEDecode", samples=sampled, vae=models.vae).only


def labelled(canvas: Canvas, pictures: Output, tasks: Node, image: Output) -> Output:
    return canvas.node("IPAdapterInstructLabelSheet", images=pictures, label=tasks["label"], reference=image).only


def own_adapter_five_instructions(canvas: Canvas) -> None:
    about = """\
## Your own adapter: one picture, five instructions
For an adapter that you trained as the paper did: one OpenCLIP model reads both the picture and the instruction. The \
same reference, prompt and seed under each task, in the upper lane; in the lower one a plain IPAdapter+, which reads \
no instruction and takes the whole picture.

**Try:** a plain adapter that was trained on the same pictures as yours: training's *--projector ip-adapter-plus*.
"""
    notes(canvas, about, OWN_FILES + PLAIN_FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = load_own(canvas)
        loaded = canvas.node(
            "IPAdapterInstructModelLoader", title="Load the plain IPAdapter+", adapter_name=PLAIN_ADAPTER
        )
    plain = models._replace(adapter=loaded.only)
    prompts = typed_once(canvas, FIVE_PROMPT)
    image = reference_picture(canvas)
    with canvas.column("All instructions", "adapter", TEXT_WIDTH):
        tasks = all_tasks(canvas, models, prompts)
    with canvas.column("No instruction", "control", TEXT_WIDTH, below=True):
        read = encode_instruction(canvas, plain, prompts, "everything")
    with canvas.column("Once for each", "adapter", NODE_WIDTH):
        adapted = apply_picture(canvas, models, tasks, image)
        latent = canvas.node("EmptyLatentImage", width=SIZE, height=SIZE).only
    with canvas.column("Plain IPAdapter+", "control", NODE_WIDTH, below=True):
        whole = apply_picture(canvas, plain, read, image)
    with canvas.column("Sampling", "picture", NODE_WIDTH):
        pictures = sample_fixed(canvas, models, adapted, latent)
    with canvas.column("Sampling", "picture", NODE_WIDTH, below=True):
        picture = sample_fixed(canvas, models, whole, latent)
    with canvas.column("Results", "picture", 2 * RESULT):
        save(canvas, labelled(canvas, pictures, tasks, image), "own_adapter_five_instructions", tall=RESULT)
        save(canvas, pictures, "own_adapter")
    with canvas.column("Result", "picture", 2 * RESULT, below=True):
        save(canvas, picture, "own_adapter_plain")
