"""Target pictures that a source does not hold: the settings of their generation, and what makes them."""

from pathlib import Path
from typing import Protocol

from PIL import Image
from pydantic import Field
from training.settings import Settings


class Generation(Settings):
    """How target pictures are generated."""

    base: Path
    """Base model: a diffusers folder or a single-file checkpoint."""
    base_config: Path | None = None
    """For a single file: a diffusers folder with the configurations of its parts; left out, the family's own."""
    size: int = Field(512, ge=64, multiple_of=8)
    """Width and height of the pictures, in pixels."""
    steps: int = Field(30, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    negative_prompt: str = "lowres, blurry, watermark, text"
    """What the pictures should not show."""
    batch_size: int = Field(8, ge=1)
    """Pictures made at once; may be changed when a build is resumed."""


class InstantStyle(Generation):
    """Targets in the style of the condition: a plain IPAdapter in the style blocks alone (paper, Sec. 3.4)."""

    adapter: Path
    """Plain IPAdapter weights for the base."""
    image_encoder: Path
    """CLIP vision model that the adapter was trained with."""
    scale: float = Field(1.0, ge=0)
    """Weight of the adapter."""
    content_scale: float = Field(0.5, ge=0)
    """How much of the CLIP text of the condition's content is subtracted from its image embedding."""


class Scribble(Generation):
    """Targets with the edges of the condition, by a scribble ControlNet (paper, Sec. 3.4)."""

    controlnet: Path
    """Scribble ControlNet for the base."""
    scale: float = Field(1.0, ge=0)
    """Weight of the ControlNet."""


class TargetMaker(Protocol):
    """Makes target pictures, one for each element of its equally long arguments."""

    def __call__(
        self, conditions: list[Image.Image], prompts: list[str], seeds: list[int], contents: list[str]
    ) -> list[Image.Image]:
        """Pictures of ``size`` by ``size`` pixels.

        Args:
            conditions: InstantStyle: the style pictures, of any size. Scribble: white-on-black edges, already
                ``size`` by ``size``.
            prompts: what the targets show.
            seeds: in 0..2^63-1; the same seed and words make the same picture.
            contents: what the conditions show, "" where it is not known; InstantStyle subtracts its CLIP text.
        """
        ...
