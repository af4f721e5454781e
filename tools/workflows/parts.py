"""What the shipped workflows are put together from: loaders, prompts, the adapter, sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .canvas import PICTURE_HEIGHT, Canvas, Node, Output
from .files import (
    ADAPTER,
    ADAPTERS_HUB,
    CHECKPOINT,
    CHECKPOINT_HUB,
    CONTROL_HUB,
    FILES,
    LORA,
    LORA_FILES,
    OPEN_CLIP,
    OPEN_CLIP_HUB,
    OWN_ADAPTER,
    OWN_FILES,
    PICTURES,
    SD3_ADAPTER,
    SD3_CHECKPOINT,
    SD3_FILES,
    SD3_HUB,
    VISION,
    on_hub,
)
from .hint_pictures import SCRIBBLE

REFERENCE = "astronaut.png"
SIZE = 512
NEGATIVE = "blurry, low quality, deformed, watermark"
READING_WIDTH, LOADER_WIDTH, TEXT_WIDTH, NODE_WIDTH, RESULT = 420, 400, 340, 320, 440

Prompts = tuple[Output | str, Output | str]  # the prompt and the negative one, typed or from another node


class Models(NamedTuple):
    """``reader`` reads the instruction, ``vision`` the picture; ``clip`` the prompts, where it is not the reader."""

    model: Output
    clip: Output
    vae: Output
    adapter: Output
    reader: Output
    vision: Output

    @property
    def readers(self) -> dict[str, Any]:
        """The inputs of the nodes that encode instructions."""
        own = {} if self.clip == self.reader else {"prompt_clip": self.clip}
        return {"adapter": self.adapter, "clip": self.reader, **own}


class Sampling(NamedTuple):
    """Side of the picture and KSampler's settings; ``latent`` is the node that gives the empty latent."""

    latent: str
    size: int
    steps: int
    cfg: float  # the text scale of the released weights' reference settings
    sampler: str
    scheduler: str


SD15_SAMPLING = Sampling("EmptyLatentImage", SIZE, 25, 5.0, "dpmpp_2m", "karras")
SD3_SAMPLING = Sampling("EmptySD3LatentImage", 1024, 30, 6.0, "euler", "normal")


class Adapter(NamedTuple):
    """An adapter with all that it needs: the note on its files, what loads them, and how it is sampled."""

    files: str
    load: Callable[[Canvas], Models]
    sampling: Sampling = SD15_SAMPLING


class Adapted(NamedTuple):
    """What the sampler reads: a MODEL that follows the picture, and the prompts."""

    model: Output
    positive: Output
    negative: Output


def load_released(
    canvas: Canvas, checkpoint: str = CHECKPOINT, hub: str = CHECKPOINT_HUB, adapter_name: str = ADAPTER
) -> Models:
    model, clip, vae = load_checkpoint(canvas, checkpoint, hub)
    adapter = canvas.node("IPAdapterInstructModelLoader", adapter_name=adapter_name)
    encoder = on_hub(VISION, "clip_vision", ADAPTERS_HUB, "models/image_encoder/model.safetensors")
    vision = canvas.node("CLIPVisionLoader", models=encoder, clip_name=VISION)
    return Models(model, clip, vae, adapter.only, clip, vision.only)


def load_sd3(canvas: Canvas) -> Models:
    return load_released(canvas, SD3_CHECKPOINT, SD3_HUB, SD3_ADAPTER)


def load_own(canvas: Canvas) -> Models:
    """One OpenCLIP model reads both the picture and the instruction."""
    model, clip, vae = load_checkpoint(canvas)
    adapter = canvas.node("IPAdapterInstructModelLoader", adapter_name=OWN_ADAPTER)
    encoder = on_hub(OPEN_CLIP, "clip_vision", OPEN_CLIP_HUB)
    open_clip = canvas.node("IPAdapterInstructOpenCLIPLoader", models=encoder, model_name=OPEN_CLIP)
    return Models(model, clip, vae, adapter.only, open_clip.only, open_clip.only)


def load_checkpoint(canvas: Canvas, name: str = CHECKPOINT, hub: str = CHECKPOINT_HUB) -> tuple[Output, Output, Output]:
    checkpoint = canvas.node("CheckpointLoaderSimple", models=on_hub(name, "checkpoints", hub), ckpt_name=name)
    return checkpoint["MODEL"], checkpoint["CLIP"], checkpoint["VAE"]


RELEASED, OWN = Adapter(FILES, load_released), Adapter(OWN_FILES, load_own)
SD3 = Adapter(SD3_FILES, load_sd3, SD3_SAMPLING)


def one_task(
    canvas: Canvas, about: str, task: str, prompt: str, subject: str = "", adapter: Adapter = RELEASED, prefix: str = ""
) -> None:
    """The plain graph of one task."""
    notes(canvas, about, adapter.files + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = adapter.load(canvas)
    image = reference_picture(canvas)
    adapted = take_from_picture(canvas, models, prompt, image, task, subject)
    make_picture(canvas, models, adapted, prefix or task, adapter.sampling)


def with_controlnet(
    canvas: Canvas, about: str, files: str, task: str, prompt: str, net: str, hint: str, adapter: Adapter = RELEASED
) -> None:
    """The graph of one task with a ControlNet on its prompts; ``files`` is the note on the ControlNet's."""
    notes(canvas, about, adapter.files + files + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = adapter.load(canvas)
        loaded_net = load_controlnet(canvas, net)
    image = reference_picture(canvas)
    adapted = take_from_picture(canvas, models, prompt, image, task)
    with canvas.column("What to hold on to", "control", NODE_WIDTH):
        picture = load_picture(canvas, "Drawing" if hint == SCRIBBLE else "Pose", hint)
        if hint == SCRIBBLE:
            picture = canvas.node("ImageInvert", image=picture).only
        controlled = hold_on_to(canvas, adapted, loaded_net, picture)
    make_picture(canvas, models, controlled, f"{task}_with_controlnet")


def load_controlnet(canvas: Canvas, net: str) -> Output:
    return canvas.node("ControlNetLoader", models=on_hub(net, "controlnet", CONTROL_HUB), control_net_name=net).only


def hold_on_to(canvas: Canvas, adapted: Adapted, net: Output, picture: Output) -> Adapted:
    controlled = canvas.node(
        "ControlNetApplyAdvanced",
        positive=adapted.positive,
        negative=adapted.negative,
        control_net=net,
        image=picture,
        strength=0.8,
    )
    return Adapted(adapted.model, controlled["positive"], controlled["negative"])


def with_lora(canvas: Canvas, about: str, task: str, prompt: str, adapter: Adapter = RELEASED) -> None:
    """The graph of one task with a LoRA before the adapter."""
    notes(canvas, about, adapter.files + LORA_FILES + PICTURES)
    with canvas.column("Models", "models", LOADER_WIDTH):
        models = adapter.load(canvas)
    image = reference_picture(canvas)
    with canvas.column("LoRA", "control", TEXT_WIDTH):
        lora = canvas.node(
            "LoraLoader", model=models.model, clip=models.clip, lora_name=LORA, strength_model=0.8, strength_clip=0.8
        )
    models = models._replace(model=lora["MODEL"], clip=lora["CLIP"])
    adapted = take_from_picture(canvas, models, prompt, image, task)
    make_picture(canvas, models, adapted, f"{task}_with_lora")


def notes(canvas: Canvas, about: str, files: str) -> None:
    with canvas.column("Read me", "text", READING_WIDTH):
        canvas.note("What this does", about)
        canvas.note("Files", files)


def load_picture(canvas: Canvas, title: str, name: str) -> Output:
    return canvas.node("LoadImage", title=title, tall=PICTURE_HEIGHT, image=name)["IMAGE"]


def reference_picture(canvas: Canvas) -> Output:
    with canvas.column("Reference picture", "adapter", LOADER_WIDTH, below=True):
        return load_picture(canvas, "Reference picture", REFERENCE)


def typed_once(canvas: Canvas, prompt: str, below: bool = False) -> Prompts:
    """The prompt and the negative prompt, for several instructions: each adapter's tokens depend on them as well."""
    with canvas.column("Prompts, typed once", "text", TEXT_WIDTH, below):
        texts = ("Prompt", prompt), ("Negative prompt", NEGATIVE)
        positive, negative = (
            canvas.node("PrimitiveStringMultiline", title=title, tall=120, value=text).only for title, text in texts
        )
    return positive, negative


def take_from_picture(
    canvas: Canvas,
    models: Models,
    prompts: Prompts | str,
    image: Output,
    task: str,
    subject: str = "",
) -> Adapted:
    """What to take from the reference picture, and the prompts."""
    prompts = (prompts, NEGATIVE) if isinstance(prompts, str) else prompts
    with canvas.column("What to take, and the prompts", "adapter", TEXT_WIDTH):
        return apply_instruction(canvas, models, prompts, task, subject, image)


def apply_instruction(
    canvas: Canvas, models: Models, prompts: Prompts, task: str, subject: str, image: Output
) -> Adapted:
    return apply_picture(canvas, models, encode_instruction(canvas, models, prompts, task, subject), image)


def encode_instruction(canvas: Canvas, models: Models, prompts: Prompts, task: str, subject: str = "") -> Node:
    return canvas.node(
        "IPAdapterInstructEncode",
        task=task,
        subject=subject,
        prompt=prompts[0],
        negative_prompt=prompts[1],
        **models.readers,
    )


def apply_picture(canvas: Canvas, models: Models, words: Node, image: Output) -> Adapted:
    """``words``: what encodes an instruction, or several, with their prompts."""
    applied = canvas.node(
        "IPAdapterInstructApply",
        model=models.model,
        adapter=models.adapter,
        instruction=words["instruction"],
        clip_vision=models.vision,
        image=image,
    )
    return Adapted(applied.only, words["positive"], words["negative"])


def make_picture(
    canvas: Canvas, models: Models, adapted: Adapted, prefix: str, sampling: Sampling = SD15_SAMPLING
) -> None:
    picture = sampled_picture(canvas, models, adapted, sampling)
    with canvas.column("Result", "picture", RESULT):
        save(canvas, picture, prefix, tall=RESULT)


def sampled_picture(canvas: Canvas, models: Models, adapted: Adapted, sampling: Sampling = SD15_SAMPLING) -> Output:
    with canvas.column("Sampling", "picture", NODE_WIDTH):
        latent = canvas.node(sampling.latent, width=sampling.size, height=sampling.size).only
        sampled = sample(canvas, adapted, latent, after="randomize", sampling=sampling)
        return canvas.node("VAEDecode", samples=sampled, vae=models.vae).only


def sample(
    canvas: Canvas,
    adapted: Adapted,
    latent: Output,
    after: str,
    sampling: Sampling = SD15_SAMPLING,
    denoise: float = 1.0,
) -> Output:
    """The host's own sampler; ``after`` says what becomes of the seed once a picture is made."""
    return canvas.node(
        "KSampler",
        model=adapted.model,
        positive=adapted.positive,
        negative=adapted.negative,
        latent_image=latent,
        seed=1,
        control_after_generate=after,
        steps=sampling.steps,
        cfg=sampling.cfg,
        sampler_name=sampling.sampler,
        scheduler=sampling.scheduler,
        denoise=denoise,
    ).only


def save(canvas: Canvas, images: Output, prefix: str, tall: int = PICTURE_HEIGHT) -> None:
    canvas.node("SaveImage", tall=tall, images=images, filename_prefix=prefix)
