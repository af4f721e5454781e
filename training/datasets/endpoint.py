"""Questions to any OpenAI-compatible chat endpoint: asked again with growing waits, and never twice once answered."""

import base64
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import requests
from pydantic import Field
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random
from training.datasets.sample import decode_picture, encode_picture
from training.files import write_atomically
from training.settings import Settings
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

logger = logging.getLogger("ipadapter_instruct")
Answer = TypeVar("Answer")

PASSING_STATUS = frozenset({408, 409, 425, 429})  # worth asking again, as are all of 500 and above


class Endpoint(Settings):
    """Where questions go, and what to do when no usable answer comes back."""

    url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    """Base URL of an OpenAI-compatible endpoint, such as https://api.openai.com/v1; empty: nothing can be asked."""
    model: str = "gpt-4o"
    """Name of the model there; the paper used GPT-4o."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; where it is not set, none is sent, as suits a local server."""
    timeout_s: float = Field(default=60, gt=0)
    """Seconds without a sign of life after which a request counts as failed."""
    attempts: int = Field(default=6, ge=1)
    """How often one question is asked before giving up."""
    first_wait_s: float = Field(default=1, ge=0)
    """Wait before the second attempt; it doubles each time; up to as much again is added at random."""
    longest_wait_s: float = Field(default=60, ge=0)
    """Where the doubling ends. A longer wait that the endpoint itself asks for is kept to."""
    on_failure: Literal["stop", "skip"] = "stop"
    """After the last attempt: stop the run, or skip and count what was asked about."""
    temperature: float | None = Field(default=None, ge=0)
    """How freely to answer; left out, the model's own default."""
    picture_side: int = Field(default=768, ge=32)
    """Pictures are shrunk to this many pixels on their longer side before they are sent."""
    cache: Path | None = Path("~/.cache/ipadapter-instruct/answers")
    """Folder of the answers kept; many processes can share it."""


class _NoAnswerError(Exception):
    """One attempt failed; ``again`` says whether another can help, after at least ``wait_s`` seconds."""

    def __init__(self, reason: str, again: bool = True, wait_s: float = 0) -> None:
        super().__init__(reason)
        self.again, self.wait_s = again, wait_s


def ask(
    endpoint: Endpoint, question: str, accept: Callable[[str], Answer], pictures: Sequence[bytes] = ()
) -> Answer | None:
    """What ``accept`` makes of the answer's text, or None where the endpoint failed and ``on_failure`` is "skip".

    Many threads and processes may ask at once. Only accepted answers are kept.

    Args:
        accept: parses the text; raises ValueError, saying why, on an answer that should be asked for again.
        pictures: encoded pictures that go with the question.

    Raises:
        ValueError: a picture is damaged, the cache cannot be written, or, with "stop", there is no usable answer.
    """
    path = _cache_path(endpoint, question, pictures)
    if path is not None:
        # A missing or damaged file, or an answer that a newer `accept` refuses, is asked for again.
        with contextlib.suppress(OSError, ValueError):
            return accept(json.loads(path.read_bytes()))
    body = _body(endpoint, question, pictures)
    growing = wait_exponential(multiplier=endpoint.first_wait_s, max=endpoint.longest_wait_s)
    growing += wait_random(0, endpoint.first_wait_s)

    def wait(state: RetryCallState) -> float:
        assert state.outcome is not None
        return max(growing(state), getattr(state.outcome.exception(), "wait_s", 0))

    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, _NoAnswerError) and error.again),
        stop=stop_after_attempt(endpoint.attempts),
        wait=wait,
        reraise=True,
    )
    try:
        text, answer = retrying(_attempt, endpoint, body, accept)
    except _NoAnswerError as error:
        message = (
            f"{endpoint.url or 'The endpoint'} gave no usable answer ({retrying.statistics['attempt_number']} of "
            f"{endpoint.attempts} attempts; the last: {error}); check the URL, the model {endpoint.model} and the key "
            f"in {endpoint.key_variable}, or go on without such answers by on_failure = skip."
        )
        if endpoint.on_failure == "skip":
            logger.warning(message)
            return None
        raise ValueError(message) from error
    if path is not None:
        _keep(path, text)
    return answer


def _attempt(endpoint: Endpoint, body: dict[str, Any], accept: Callable[[str], Answer]) -> tuple[str, Answer]:
    """One request: the answer's text and what ``accept`` makes of it."""
    try:
        response = requests.post(
            f"{endpoint.url.rstrip('/')}/chat/completions",
            json=body,
            headers=_authorisation(endpoint),
            timeout=endpoint.timeout_s,
        )
    except requests.RequestException as error:  # those that are ValueErrors tell of a bad URL or header
        raise _NoAnswerError(f"{type(error).__name__}: {error}", again=not isinstance(error, ValueError)) from error
    if not response.ok:
        raise _NoAnswerError(
            f"HTTP {response.status_code}: {_short(response.text)}",
            again=response.status_code >= 500 or response.status_code in PASSING_STATUS,
            wait_s=_asked_wait(response),
        )
    try:
        text = response.json()["choices"][0]["message"]["content"].strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _NoAnswerError(f"no chat completion but {_short(response.text)}") from error
    if not text:
        raise _NoAnswerError("an empty text")
    try:
        return text, accept(text)
    except ValueError as error:
        raise _NoAnswerError(f"{error}, in {_short(text)}") from error


def _authorisation(endpoint: Endpoint) -> dict[str, str]:
    if not endpoint.url:
        raise ValueError("No endpoint is named; set its URL, such as https://api.openai.com/v1.")
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"The key in {endpoint.key_variable} holds characters that no key has; set it anew.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _asked_wait(response: requests.Response) -> float:
    """Seconds that the endpoint asks for by Retry-After, given as seconds or as a date."""
    try:
        return Retry().parse_retry_after(response.headers["Retry-After"])
    except (KeyError, HTTPError):
        return 0


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}…")


def _body(endpoint: Endpoint, question: str, pictures: Sequence[bytes]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    for picture in pictures:
        image = decode_picture(picture)
        image.thumbnail((endpoint.picture_side, endpoint.picture_side))
        url = f"data:image/jpeg;base64,{base64.b64encode(encode_picture(image, quality=90)).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    settings = {} if endpoint.temperature is None else {"temperature": endpoint.temperature}
    return {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": content if pictures else question}],
        **settings,
    }


def _cache_path(endpoint: Endpoint, question: str, pictures: Sequence[bytes]) -> Path | None:
    """Where the answer is kept; the pictures' own bytes count, so that a hit decodes none of them."""
    if endpoint.cache is None:
        return None
    asked = [
        endpoint.model,
        question,
        [hashlib.sha256(picture).hexdigest() for picture in pictures],
        endpoint.picture_side if pictures else None,
        endpoint.temperature,
    ]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return endpoint.cache.expanduser() / key[:2] / f"{key[2:]}.json"


def _keep(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another thread was first with the same answer
            write_atomically(path, json.dumps(text).encode())
    except OSError as error:
        raise ValueError(
            f"The endpoint's answer cannot be kept in {path.parent} ({error}); make room, or name another cache."
        ) from error
