"""What `evaluate` is told."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from training.frozen.encoders import EncoderPaths
from training.instructions.choose import Wording

# What may change when a folder of pictures is gone on with: no picture depends on it. Of rows, data and models the
# content is held, wherever they lie.
FREE_SETTINGS = {"rows", "out", "scorer", "batch_size", "max_skipped", "device", "data", *EncoderPaths.model_fields}


def _listed(value: object) -> object:
    """One model as a list of one, which a config may still say."""
    return [value] if isinstance(value, str | Path) else value


class EvaluateConfig(EncoderPaths):
    """Settings of `python -m training evaluate`."""

    rows: dict[str, dict[str, Path]]
    """Rows of the table, each with its adapter files by task; "all" stands for the tasks not named."""
    data: list[Path]
    """Folders of shards from `build`; their validation samples are used."""
    out: Path
    """Folder for pictures, scores.json and table.md."""
    scorer: Annotated[list[Path], Field(min_length=1), BeforeValidator(_listed)]
    """The open_clip models of the scores, both towers of each: a table of each. One at least should not be the encoder
    that the adapters read, which they are trained to please."""
    samples: int = Field(1000, ge=1)
    """Samples a task at most."""
    instructions: Wording = "unseen"
    """The tasks' fixed wordings, random ones of the bank, or random ones that were never trained on."""
    rewordings: int = Field(0, ge=0)
    """Further wordings for the first two samples of each task, for the figure; they are not scored."""
    batch_size: int = Field(8, ge=1)
    """Pictures made at once."""
    resolution: int = 512
    """Side of the pictures."""
    steps: int = 30
    """Sampling steps."""
    text_scale: float | None = None
    """Guidance scale of the text; by default the base's: 5 on SD1.5, 7 on SDXL, 6 on SD3 and SD3.5."""
    weight: float | None = None
    """Strength of the adapters; by default each task's own."""
    guidance: Literal["task", "simple"] = "task"
    """Each task's reference guidance, or simple guidance for all."""
    seed: int = 0
    """Decides noise and instructions; every row gets the same."""
    max_skipped: float = 0.01
    """Largest share of samples that may be damaged before the run stops."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where everything runs."""
