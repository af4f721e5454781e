"""The settings of a training run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ipadapter_instruct_core.projector import NEW_LAYER_SIGMA
from ipadapter_instruct_core.tasks import Task
from pydantic import Field, model_validator
from training.features.draws import Dropout
from training.frozen.encoders import CLIP_L
from training.held import defaults_of, hold
from training.settings import Settings
from training.train.adapter import Projector

# What may change when a run goes on: none of these changes what is learned. Files may have moved; that they hold the
# same is seen by `identity` in data.py.
FREE_SETTINGS = {
    "out", "micro_batch_size", "workers", "cpu", "gradient_checkpointing", "compile", "channels_last",
    "fused_optimizer", "checkpoint_every", "keep", "snapshot_every", "profile", "log_every", "trackers",
    "validation", "max_skipped", "base", "base_config", "features", "data", "image_encoder", "instruction_encoder",
    "start",
}  # fmt: skip


class Validation(Settings):
    """What is looked at while training: always the same held-out samples, seeds and instructions."""

    every: int = Field(default=2000, ge=0)
    """Steps between validations; 0 for none."""
    samples: int = Field(default=64, ge=1)
    """Samples a task for the validation loss."""
    pictures: int = Field(default=64, ge=0)
    """Samples a task of which pictures are made, and scored where `scorer` is given; the first eight are shown."""
    steps: int = Field(default=30, ge=1)
    """Sampling steps of a picture."""
    text_scale: float | None = None
    """Guidance scale of the text; by default the base's: 5 on SD1.5, 7 on SDXL, 6 on SD3 and SD3.5."""
    scorer: Path | None = None
    """An open_clip model, both towers, for CLIP-I, CLIP-T, CLIP-P and CLIP-S; none: no scores."""


class TrainConfig(Settings):
    """Settings of `python -m training train`."""

    base: Path
    """Frozen base model: a diffusers folder, or of SD1.5 and SDXL a single-file .safetensors checkpoint."""
    base_config: Path | None = None
    """For a single-file base that is no plain SD1.5 or SDXL: a diffusers folder with its configurations."""
    out: Path
    """Folder of the run: checkpoints, logs, validation pictures. The same command goes on where it stopped."""

    features: Path | None = None
    """Features from `encode`. Give this, or `data`."""
    data: list[Path] = Field(default_factory=list)
    """Folders of raw shards from `build`; every encoder then runs at every step."""
    image_encoder: Path | None = None
    """With `data`: the CLIP ViT-H/14 image tower."""
    instruction_encoder: str = CLIP_L
    """With `data`: "clip-l", or the path of an open_clip model."""
    resolution: int = 512
    """With `data`: side of the square that targets are cut to."""

    start: Path | None = None
    """Adapter to start from: IPAdapter+ (gets the paper's new layers) or instruct weights; none: from scratch."""
    projector: Projector = "paper"
    """"paper" reads picture and instruction, "released" the prompt too, "ip-adapter-plus" only the picture."""
    trained: Literal["all", "instruct"] = "all"
    """"instruct" trains the layers alone that read the instruction and the prompt; all else stays as in `start`."""
    new_layer_sigma: float = Field(NEW_LAYER_SIGMA, gt=0)
    """Standard deviation of the weights inside the layers that a start from IPAdapter+ lacks; the last of each branch
    are zero, so that training begins at IPAdapter+ whatever this is. The paper's is 1e-4; more is heard sooner."""
    tasks: dict[Task, float] = Field(default_factory=dict)
    """Tasks and their weights in the mixture; by default all that the data hold, alike."""
    instructions: Literal["bank", "fixed"] = "bank"
    """A random phrasing of the bank each time, or always the task's fixed one (the paper's ablation)."""
    fixed_share: float = Field(0.0, ge=0, le=1)
    """With `bank`: share of the instructions that are the fixed wording all the same, which the nodes send."""
    dropout: Dropout = Field(default_factory=Dropout)
    """How often conditions are dropped."""

    batch_size: int = Field(512, ge=1)
    """Samples of a step, over all processes."""
    micro_batch_size: int = Field(16, ge=1)
    """Samples that one process handles at once; the rest of its share is accumulated."""
    steps: int = Field(100_000, ge=1)
    """Steps of the whole run."""
    learning_rate: float = Field(1e-6, gt=0)
    """Of AdamW, after the warm-up."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw8bit" keeps AdamW's two averages in eight bits, by bitsandbytes, on a CUDA card."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """How slowly AdamW's averages of the gradients and of their squares follow."""
    adam_eps: float = Field(1e-15, gt=0)
    """What AdamW adds to the root of the second average. The paper's new layers start with gradients of about 1e-9,
    which the usual 1e-8 would hold back."""
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """How the learning rate goes on after the warm-up."""
    warmup: int = Field(0, ge=0)
    """Steps in which the learning rate rises from zero."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW, on matrices; norms, biases and the learned latents never decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients longer than this are shortened; 0 for never."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is what validation and export then use; 0 for none."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; the trained weights stay in float32."""
    gradient_checkpointing: bool = False
    """Keep fewer activations of the base and compute them again: less memory, about a third slower."""
    compile: bool = False
    """torch.compile for the base's UNet."""
    channels_last: bool = False
    """Lay the base's convolutions out with their channels last, as tensor cores read them."""
    fused_optimizer: bool = False
    """AdamW's whole update in one kernel, in place of one for each of its operations."""
    seed: int = Field(0, ge=0)
    """Decides everything random."""
    workers: int = Field(4, ge=0)
    """Processes that read samples ahead, for each training process."""
    cpu: bool = False
    """Train on the CPU even where a card is present."""

    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints; one is also saved at the end and on SIGTERM."""
    keep: int = Field(3, ge=1)
    """How many checkpoints stay."""
    snapshot_every: int = Field(10_000, ge=0)
    """Steps between snapshots: the weights alone (the average, if kept), in half precision, which all stay; 0: none."""
    profile: int = Field(0, ge=0)
    """Steps of which torch.profiler writes a trace to OUT/profile, after three to warm up; 0 for none."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of the log."""
    trackers: list[str] = Field(default_factory=lambda: ["tensorboard"])
    """Trackers of accelerate: tensorboard, wandb, comet_ml, mlflow, ..., none for an empty list."""
    validation: Validation = Field(default_factory=Validation)
    """What is looked at while training."""
    max_skipped: float = Field(0.01, ge=0, le=1)
    """Largest share of samples that may be damaged before the run stops."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if (self.features is None) == (not self.data):
            raise ValueError("give either `features` (from encode) or `data` (from build)")
        if self.data and self.image_encoder is None:
            raise ValueError("training from raw shards needs `image_encoder`")
        if self.trained == "instruct" and (self.start is None or self.projector == "ip-adapter-plus"):
            raise ValueError('`trained = "instruct"` needs a `start`, and a `projector` that reads instructions')
        return self


def hold_to_settings(config: TrainConfig, identity: Mapping[str, Any], path: Path, begun: bool) -> None:
    """Keep the settings with the run, and hold a resumed run to them, once it has a checkpoint."""
    settings = config.model_dump(mode="json", exclude=FREE_SETTINGS) | dict(identity)
    free = {"steps"} if config.schedule == "constant_with_warmup" else set()  # more of the same may follow
    hold(path, settings, "a run", defaults_of(TrainConfig), free, begun)
