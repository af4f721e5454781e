"""Composition: captioned pictures, with targets that a scribble ControlNet makes from their edges (paper, Sec. 3.4)."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.datasets.sample import Sample, decode_picture
from training.datasets.sources.builder import Item, Source, captioned
from training.datasets.sources.files import pictures_in
from training.datasets.sources.folders import LeftOut
from training.datasets.targets.canny import edge_map
from training.datasets.targets.settings import Scribble


class Composition(Source):
    """CommonCanvas, or other captioned pictures; targets by a scribble ControlNet on their canny edges."""

    kind: Literal["composition"] = "composition"
    """Which source this is."""
    pictures: Path
    """Captioned pictures: a parquet file, or a folder of parquet files or of pictures with a .txt beside each."""
    targets: Scribble
    """How the targets are generated."""
    picture_column: str = ""
    """Column of the pictures; left out, the first that holds bytes."""
    caption_column: str = ""
    """Column of the captions; left out, one with a usual name."""

    generation: ClassVar[str] = "targets"

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        pictures = pictures_in(self.pictures, self.picture_column, self.caption_column)
        return captioned(Task.COMPOSITION, pictures)

    def guide(self, sample: Sample) -> Image.Image:
        return edge_map(decode_picture(sample.condition), self.targets.size)
