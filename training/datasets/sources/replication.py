"""Replication: the target is the condition, with its original prompt (JourneyDB; paper, Sec. 3.4)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ipadapter_instruct_core.tasks import Task
from training.datasets.sources.builder import Item, Source, chance
from training.datasets.sources.files import Place, json_lines
from training.datasets.sources.folders import LeftOut, Listing, inside, missing_from


class Replication(Source):
    """JourneyDB: target = condition, with the original prompts."""

    kind: Literal["replication"] = "replication"
    """Which source this is."""
    annotations: Path
    """JourneyDB's JSONL file, such as train_anno.jsonl, with img_path and prompt."""
    images: Path
    """The folder that the img_path of the annotations starts from, with as many of the numbered folders as you have."""

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        what, listing = "JourneyDB's JSONL of img_path and prompt", Listing()
        for number, record in json_lines(self.annotations, what):
            for name, kind in (("img_path", str), ("prompt", str | None)):  # some prompts are null
                if name not in record or not isinstance(record[name], kind):
                    raise ValueError(f"{self.annotations}, line {number} has no field {name}; {what} is expected.")
            path = inside(self.images, record["img_path"])
            if path not in listing:
                yield missing_from(self.images, record["img_path"])
                continue
            prompt = (record["prompt"] or "").strip()
            yield Item(
                source_id=record["img_path"],
                group=f"prompt-{chance(prompt.lower()):016x}",  # one prompt's pictures look much alike
                task=Task.EVERYTHING,
                condition=Place(path),
                prompt=prompt,
                condition_prompt=prompt,
            )
