"""`python -m training instructions`: more wordings for the bank from a chat endpoint (paper, Sec. 3.4)."""

import json
import logging
import random
import re
from pathlib import Path
from typing import Literal

from ipadapter_instruct_core.tasks import Task
from pydantic import Field
from training.datasets.endpoint import Endpoint, ask
from training.files import write_atomically
from training.instructions import BANK, KEYWORDS, UNSEEN, keeps_to_its_task, load, plain
from training.settings import Settings

logger = logging.getLogger("ipadapter_instruct")

LONGEST = 40  # words; CLIP reads 77 tokens
EXAMPLES = 15  # known wordings that a request shows
WHAT = {
    Task.EVERYTHING: "everything from an image, so that a near copy of it is made",
    Task.STYLE: "only the style from an image, for a picture of something else",
    Task.COMPOSITION: "only the composition from an image, for a picture of something else",
    Task.OBJECT: "an object from an image and putting it into another scene",
    Task.FACE: "only the face or identity of a person from an image, for another scene",
}


class InstructionsConfig(Settings):
    """Ask a chat endpoint for more wordings of a task's instruction and add those that pass to the bank."""

    task: Literal["everything", "style", "composition", "object", "face", "all"] = "all"
    """The task to find wordings for."""
    count: int = Field(200, ge=1)
    """How many new wordings to add to each task."""
    batch: int = Field(50, ge=1, le=500)
    """How many wordings one request asks for."""
    stale_batches: int = Field(5, ge=1)
    """Give up after this many requests in a row that bring nothing new."""
    out: Path | None = None
    """Folder of the bank, one {task}.txt each, which starts as a copy of ours; left out, ours itself is extended."""
    endpoint: Endpoint = Endpoint(temperature=1.0)
    """Where to ask."""


def run(config: InstructionsConfig) -> None:
    """Add ``count`` new wordings to each task asked for; what came before a failure is kept.

    Raises:
        ValueError: the endpoint failed, or had nothing new to say for ``stale_batches`` requests.
    """
    for task in [task for task in KEYWORDS if config.task in (task.value, "all")]:
        total = _extend(task, config)
        print(f"{task.value}: {config.count} new wordings, {total} in all, in {_path(task, config)}")


def _path(task: Task, config: InstructionsConfig) -> Path:
    return (config.out or BANK) / f"{task.value}.txt"


def _extend(task: Task, config: InstructionsConfig) -> int:
    """Returns how many wordings the task then has."""
    from tqdm import tqdm

    path = _path(task, config)
    phrases = load(task, path.parent if path.exists() else None)
    known = {plain(phrase) for phrase in phrases + load(task, UNSEEN)}
    endpoint = config.endpoint.model_copy(update={"cache": None})  # the bank itself keeps what was answered
    wanted, stale = len(phrases) + config.count, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=config.count, desc=task.value, unit="wording") as bar:
        while len(phrases) < wanted:
            if stale == config.stale_batches:
                raise ValueError(
                    f"{endpoint.model} gave no new wording for {task.value} in {stale} requests, after {bar.n} of "
                    f"{config.count} were added to {path}; raise the endpoint's temperature, or ask another model."
                )
            examples = random.sample(phrases, min(EXAMPLES, len(phrases)))
            answered = ask(endpoint, _question(task, config.batch, examples), _phrases) or []
            new = _new(task, answered, known)[: wanted - len(phrases)]
            logger.info(
                "%s: %d of %d answered wordings are new and keep to the task", task.value, len(new), len(answered)
            )
            stale = 0 if new else stale + 1
            if new:
                phrases += new
                write_atomically(path, ("\n".join(phrases) + "\n").encode())
                bar.update(len(new))
    return len(phrases)


def _question(task: Task, count: int, examples: list[str]) -> str:
    """The paper's request in our words, with known wordings to stay away from."""
    banned = [word for other, words in KEYWORDS.items() if other is not task for word in words]
    one_object = 'Each one holds the word "object" exactly once, where a noun such as "dog" could stand. '
    return (
        f"Generate {count} different ways in which people would tell an image generator about taking {WHAT[task]}. "
        "Vary the length from 2 to 30 words, the wording and the tone: terse, polite, casual, technical, questions. "
        f"{one_object if task is Task.OBJECT else ''}Do not use the words {', '.join(banned)} in any form. "
        "Do not repeat or merely reword these: "
        f"{json.dumps(examples, ensure_ascii=False)}. Answer with a JSON list of strings and nothing else."
    )


def _phrases(text: str) -> list[str]:
    """The wordings of an answer; a fence around the list is no harm."""
    found = re.search(r"\[.*\]", text, re.DOTALL)
    phrases = json.loads(found[0]) if found else None
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError("not a JSON list of strings")
    return phrases


def _new(task: Task, answered: list[str], known: set[str]) -> list[str]:
    """Those that keep to the task's rules and are not ``known``, which they then are."""
    new = []
    for phrase in (" ".join(phrase.split()) for phrase in answered):
        fits = 1 <= len(phrase.split()) <= LONGEST and keeps_to_its_task(task, phrase)
        if task is Task.OBJECT:
            fits = fits and len(re.findall(r"object", phrase, re.IGNORECASE)) == 1
        if fits and plain(phrase) and plain(phrase) not in known:
            known.add(plain(phrase))
            new.append(phrase)
    return new
