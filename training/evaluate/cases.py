"""Held-out samples, and what they are told: what every row of a table is asked for."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.datasets.index import Shards
from training.datasets.sample import Sample, decode_picture
from training.datasets.shards import Tally, read_manifest
from training.evaluate.settings import EvaluateConfig
from training.instructions.choose import drawn

log = logging.getLogger("ipadapter_instruct")

CONDITIONS = "conditions"


@dataclass(frozen=True)
class Case:
    """One picture to make: a held-out sample, told to do its task in certain words.

    ``original`` is the index of the case that this one rewords, None where it is no rewording.
    """

    index: int
    sample: Sample
    instruction: str
    seed: int
    original: int | None = None

    @property
    def condition_name(self) -> str:
        """A rewording's is that of its original, by which figures find the two."""
        return f"{CONDITIONS}/{self.sample.task.value}/{self.index if self.original is None else self.original:05d}.jpg"

    @property
    def condition(self) -> Image.Image:
        return decode_picture(self.sample.condition)


def held_out(config: EvaluateConfig) -> dict[Task, list[Case]]:
    """The first validation samples of each task.

    Raises:
        ValueError: there are none, or too many are damaged.
    """
    tally = Tally(config.max_skipped)
    cases: dict[Task, list[Case]] = {}
    for folder in config.data:
        names = [shard["name"] for shard in read_manifest(folder, "build")["shards"]]
        shards = Shards([folder / name for name in names if name.startswith("validation")], tally)
        for task, places in shards.by_task.items():
            of_task = cases.setdefault(task, [])
            for place in places:
                if len(of_task) == config.samples:
                    break
                try:
                    entry = Sample.from_members(shards[place])
                    entry.pictures()
                except (KeyError, TypeError, ValueError) as error:
                    tally.lose(shards.name(place), str(error))
                    continue
                seed = config.seed * 1_000_003 + len(of_task)
                words = drawn(config.instructions, task, entry.subject, seed)
                of_task.append(Case(len(of_task), entry, words, seed))
    tally.check()
    for name, why in tally.skipped:
        log.warning("evaluate: skipped %s: %s", name, why)
    found = {task: of_task for task, of_task in cases.items() if of_task}
    if not found:
        raise ValueError("The data hold no validation samples; build them with --validation of at least 1.")
    return found


def reworded(config: EvaluateConfig, task: Task, cases: Sequence[Case]) -> list[Case]:
    """The first two cases again, with the same noise and other instructions."""
    count = config.rewordings
    return [
        Case(
            len(cases) + place * count + n,
            case.sample,
            drawn(config.instructions, task, case.sample.subject, case.seed + 1 + n),
            case.seed,
            case.index,
        )
        for place, case in enumerate(cases[:2])
        for n in range(count)
    ]
