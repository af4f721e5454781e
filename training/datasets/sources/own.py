"""Own data: a JSONL file of conditions, targets and prompts, or a folder of captioned pictures."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from ipadapter_instruct_core.tasks import Task
from training.datasets.sources.builder import Item, Source, captioned
from training.datasets.sources.files import Place, existing, json_lines, pictures_in
from training.datasets.sources.folders import LeftOut, Listing, inside, missing_from

FIELDS = ("condition", "target", "prompt", "task", "subject", "group", "condition_prompt")


class Own(Source):
    """Your own data: a JSONL file, or a folder of pictures with a .txt caption beside each."""

    kind: Literal["own"] = "own"
    """Which source this is."""
    data: Path
    """A folder of pictures, or a .jsonl file of {"condition", "target", "prompt", "task", "subject", "group",
    "condition_prompt"}: paths from the file's folder; without a target it is the condition, and group names what must
    not be split between training and validation."""
    task: Annotated[Task | None, tyro.conf.EnumChoicesFromValues] = None
    """The task of a folder, and of lines that name none."""

    def plan(self, seed: int) -> Iterator[Item | LeftOut]:
        existing(self.data, "a folder of pictures or a .jsonl file")
        if not self.data.is_dir():
            yield from self._lines()
            return
        if self.task is None:
            raise ValueError(f"No task is set for the folder {self.data}; set one of {_tasks()}.")
        yield from captioned(self.task, pictures_in(self.data))

    def _lines(self) -> Iterator[Item | LeftOut]:
        folder, listing = self.data.parent, Listing()
        for number, record in json_lines(self.data, f"an object with {', '.join(FIELDS)}"):
            line = f"{self.data}, line {number}"
            unknown = [name for name in record if name not in FIELDS]
            if unknown:
                raise ValueError(f"{line} has the unknown field {unknown[0]}; the fields are {', '.join(FIELDS)}.")
            wrong = [name for name, value in record.items() if not isinstance(value, str | None)]
            if wrong or not record.get("condition"):
                raise ValueError(f"{line} needs a text in the field {(wrong or ['condition'])[0]}.")
            words = {name: record.get(name) or "" for name in FIELDS}
            try:
                task = _task(words["task"]) if words["task"] else self.task
                places = [Place(inside(folder, words[name])) for name in ("condition", "target") if words[name]]
            except ValueError as error:
                raise ValueError(f"{line}: {error}") from None
            if task is None:
                raise ValueError(f"{line} names no task; add the field task, or set one of {_tasks()} for all.")
            missing = next((place for place in places if place.path not in listing), None)
            if missing is not None:
                yield missing_from(folder, os.path.relpath(missing.path, folder))
                continue
            yield Item(
                source_id=f"{self.data.name}:{number}",
                group=words["group"] or words["condition"],
                task=task,
                condition=places[0],
                target=places[1] if len(places) > 1 else None,
                prompt=words["prompt"],
                subject=words["subject"],
                condition_prompt=words["condition_prompt"] or ("" if len(places) > 1 else words["prompt"]),
            )


def _task(name: str) -> Task:
    try:
        return Task(name)
    except ValueError:
        raise ValueError(f"the task {name} is none of {_tasks()}.") from None


def _tasks() -> str:
    return ", ".join(task.value for task in Task)
