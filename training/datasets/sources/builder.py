"""What every source dataset gives: a light plan of its samples, and the making of one sample from its files."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.datasets.sample import Sample
from training.datasets.sources.files import Place, kept
from training.datasets.sources.folders import LeftOut
from training.datasets.targets.settings import Generation
from training.settings import Settings


def chance(*names: object) -> int:
    """A number in 0..2^63-1 that is always the same for the same names; the source of every random choice here."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Item:
    """A sample to be made; see `Sample` for what its words mean. ``target`` is None as it is there."""

    source_id: str
    group: str
    task: Task
    condition: Place
    target: Place | None = None
    prompt: str = ""
    subject: str = ""
    condition_prompt: str = ""

    def read(self) -> "Pictures":
        """Its encoded pictures, each read once. Raises ValueError where one is not there."""
        condition = self.condition.read()
        if self.target is None or self.target == self.condition:
            return Pictures(condition, condition if self.target else None)
        return Pictures(condition, self.target.read())


class Pictures(NamedTuple):
    """The encoded pictures of an item, as the source holds them."""

    condition: bytes
    target: bytes | None


def captioned(task: Task, pictures: Iterable[tuple[str, Place, str] | LeftOut]) -> Iterator[Item | LeftOut]:
    """A sample of each (name, place, caption), whose target is the picture itself or is generated from it."""
    for picture in pictures:
        if isinstance(picture, LeftOut):
            yield picture
            continue
        name, place, caption = picture
        yield Item(name, group=name, task=task, condition=place, prompt=caption, condition_prompt=caption)


class Source(Settings):
    """A source dataset: the settings of its builder."""

    generation: ClassVar[str] = ""  # the setting that holds how targets are generated

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        """Every sample that the source could give, always in the same order, and what it leaves out.

        Raises:
            ValueError: an annotation file is missing or is not what was expected.
        """
        raise NotImplementedError

    def condition(self, item: Item, content: bytes, size: int) -> bytes:
        """The condition picture as it goes into the shard, encoded. Raises ValueError for a bad picture."""
        return kept(content, size)

    def make(self, item: Item, pictures: Pictures, size: int) -> Sample:
        """One sample, its pictures with a short side of at most ``size``; a generated target is still missing.

        Raises:
            ValueError: a picture is damaged or not as the annotations say.
        """
        return Sample(
            condition=self.condition(item, pictures.condition, size),
            target=None if pictures.target is None else kept(pictures.target, size),
            prompt=item.prompt,
            task=item.task,
            source_id=item.source_id,
            group=item.group,
            subject=item.subject,
            condition_prompt=item.condition_prompt,
        )

    def described(self, sample: Sample, text: str) -> Sample:
        """The sample with what an endpoint says of its target, or of its condition where it has no target yet."""
        return replace(sample, prompt=text, condition_prompt=text if sample.target is None else sample.condition_prompt)

    @property
    def generated(self) -> Generation | None:
        """How targets are generated; None where the source holds them."""
        return getattr(self, self.generation) if self.generation else None

    def guide(self, sample: Sample) -> Image.Image:
        """The picture that a generated target follows. Raises ValueError where the condition gives none."""
        raise NotImplementedError
