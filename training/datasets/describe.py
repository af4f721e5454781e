"""Prompts for pictures that come without one, from an endpoint that sees (COCO and CelebA; paper, Sec. 3.4)."""

import re

from training.datasets.endpoint import Endpoint, ask

QUESTION = (
    "Write the prompt that a person would type into a text-to-image model to get this picture: one plain English "
    "sentence of 5 to 40 words on one line that says who or what is seen, doing what, and where. Name no real person. "
    "Answer with that sentence alone, without quotation marks and without opening words like 'a picture of'."
)
REFUSAL = re.compile(r"(i['’]?m |i am |i can(no|['’])?t |sorry|unable to|as an ai)", re.IGNORECASE)


def describe_picture(endpoint: Endpoint, picture: bytes, subject: str = "") -> str | None:
    """A one-sentence prompt for an encoded picture; None where the endpoint failed and failures are skipped.

    ``subject`` is a name that the prompt has to mention, "" for none. Raises what `ask` raises.
    """
    question = f"{QUESTION} It has to mention the {subject}." if subject else QUESTION
    return ask(endpoint, question, _sentence, [picture])


def _sentence(text: str) -> str:
    sentence = text.strip().strip("\"'“”").strip()
    if "\n" in sentence or not 3 <= len(sentence.split()) <= 60:
        raise ValueError("not one line of 3 to 60 words")
    if REFUSAL.match(sentence):
        raise ValueError("a refusal")
    return sentence
