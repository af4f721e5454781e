"""Style: style pictures, with targets that InstantStyle makes from prompts of an art set (paper, Sec. 3.4)."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from ipadapter_instruct_core.tasks import Task
from PIL import Image
from pydantic import Field
from training.datasets.sample import Sample, decode_picture
from training.datasets.sources.builder import Item, Source, chance
from training.datasets.sources.files import pictures_in, texts_in
from training.datasets.sources.folders import LeftOut
from training.datasets.targets.settings import InstantStyle


class Style(Source):
    """Style pictures, such as ehristoforu/midjourney-images; targets by InstantStyle with prompts of an art list."""

    kind: Literal["style"] = "style"
    """Which source this is."""
    pictures: Path
    """Style pictures: a parquet file, or a folder of parquet files or pictures."""
    prompts: Path
    """Art list whose texts are the targets' prompts: .txt with a line each, .csv, .jsonl or .parquet."""
    targets: InstantStyle
    """How the targets are generated."""
    picture_column: str = ""
    """Column of the pictures; left out, the first that holds bytes."""
    caption_column: str = ""
    """Column that says what the pictures show; left out, one with a usual name, if there is any."""
    prompt_column: str = ""
    """Column of the art list; left out, one with a usual name."""
    targets_per_picture: int = Field(1, ge=1)
    """Targets with different prompts made from each style picture."""

    generation: ClassVar[str] = "targets"

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        prompts = texts_in(self.prompts, self.prompt_column)
        random.Random(chance(seed, "prompts")).shuffle(prompts)
        count = 0
        for picture in pictures_in(self.pictures, self.picture_column, self.caption_column):
            if isinstance(picture, LeftOut):
                yield picture
                continue
            name, place, caption = picture
            for number in range(self.targets_per_picture):
                yield Item(
                    source_id=f"{name}#{number}",
                    group=name,
                    task=Task.STYLE,
                    condition=place,
                    prompt=prompts[count % len(prompts)],
                    condition_prompt=caption,
                )
                count += 1

    def described(self, sample: Sample, text: str) -> Sample:
        return replace(sample, condition_prompt=text)  # the prompt is the art list's

    def guide(self, sample: Sample) -> Image.Image:
        return decode_picture(sample.condition)
