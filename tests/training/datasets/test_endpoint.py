"""The chat endpoint's client against a real HTTP server that answers well, badly, late or not at all."""

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from training.datasets.describe import describe_picture
from training.datasets.endpoint import Endpoint, ask

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "What is 6 times 7?"


class Played:
    """An endpoint that gives the replies it is told to, in turn; the last one for ever."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.replies: list[tuple[int, dict[str, str], bytes]] = []
        self.pause_s = 0.0
        played = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                played.headers.append(dict(self.headers))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                played.requests.append({"path": self.path, **json.loads(body)})
                time.sleep(played.pause_s)
                replies = played.replies
                status, headers, content = replies.pop(0) if len(replies) > 1 else replies[0]
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that no longer waits
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def says(self, *replies: str | tuple[int, dict[str, str], bytes]) -> None:
        self.replies = [reply if isinstance(reply, tuple) else completion(reply) for reply in replies]


def completion(text: str) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def played() -> Iterator[Played]:
    endpoint = Played()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


@pytest.fixture
def at(played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Endpoint]:
    """Makes the configuration of an endpoint at the played one, with tiny waits and a cache of its own."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = {"url": played.url, "model": "m", "attempts": 3, "first_wait_s": 0.01, "cache": tmp_path / "answers"}
    return lambda **changes: Endpoint(**{**settings, **changes})


def kept(endpoint: Endpoint) -> int:
    return len(list(endpoint.cache.rglob("*.json")))


def picture(size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_question_is_sent_as_the_protocol_says(played, at, monkeypatch):
    played.says("42")
    monkeypatch.setenv("MY_KEY", "sesame\n")
    assert ask(at(key_variable="MY_KEY", temperature=0.5), QUESTION, int) == 42
    assert played.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "m",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0.5,
        }
    ]
    assert played.headers[0]["Authorization"] == "Bearer sesame"


def test_no_key_sends_none_and_no_setting_sends_none(played, at):
    played.says("42")
    ask(at(), QUESTION, int)
    assert "Authorization" not in played.headers[0] and "temperature" not in played.requests[0]


def test_an_answer_is_asked_for_once(played, at):
    played.says("42")
    assert [ask(at(), QUESTION, int) for _ in range(3)] == [42] * 3
    assert len(played.requests) == 1


def test_another_process_finds_the_answer(played, at):
    played.says("42")
    endpoint = at()
    ask(endpoint, QUESTION, int)
    code = (
        "import sys; from training.datasets.endpoint import Endpoint, ask\n"
        f"print(ask(Endpoint.model_validate_json(sys.argv[1]), {QUESTION!r}, int) + 1)"
    )
    command = [sys.executable, "-c", code, endpoint.model_dump_json()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("43\n", 0), result.stderr
    assert len(played.requests) == 1


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 1.0}])
def test_other_settings_are_another_question(played, at, change):
    played.says("42")
    ask(at(), QUESTION, int)
    ask(at(**change), QUESTION, int)
    ask(at(), f"{QUESTION} ", int)
    assert len(played.requests) == 3


def test_pictures_count_as_part_of_the_question_and_are_sent_small(played, at):
    played.says("42")
    for colour in ("red", "red", "blue"):
        ask(at(picture_side=64), QUESTION, int, [picture((400, 200), colour)])
    assert len(played.requests) == 2
    text, image = played.requests[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": QUESTION}
    start, _, content = image["image_url"]["url"].partition(",")
    assert (image["type"], start) == ("image_url", "data:image/jpeg;base64")
    sent = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (sent.format, sent.size) == ("JPEG", (64, 32))
    red, green, blue = sent.getpixel((30, 15))
    assert red > 240 and green < 15 and blue < 15


def test_a_damaged_picture_is_said_at_once(played, at):
    with pytest.raises(ValueError, match="picture cannot be read"):
        ask(at(), QUESTION, int, [picture()[:60]])
    assert not played.requests


GARBAGE = {
    "server error": ((500, {}, b"oops"), "HTTP 500: 'oops'"),
    "not JSON": ((200, {}, b"<html>hello</html>"), "no chat completion but '<html>hello</html>'"),
    "no choices": ((200, {}, b'{"choices": []}'), "no chat completion but"),
    "a list": ((200, {}, b"[1]"), "no chat completion but"),
    "null content": ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), "no chat completion but"),
    "empty text": (completion(" \n"), "an empty text"),
    "refused": (completion("forty-two"), "invalid literal for int.*in 'forty-two'"),
    "overloaded": ((429, {}, b"slow down"), "HTTP 429: 'slow down'"),
    "nonsense for a wait": ((429, {"Retry-After": "a while"}, b"slow down"), "HTTP 429: 'slow down'"),
}


@pytest.mark.parametrize("reply", [reply for reply, _ in GARBAGE.values()], ids=list(GARBAGE))
def test_a_fault_that_passes_costs_one_more_request(played, at, reply):
    played.says(reply, "42")
    assert ask(at(), QUESTION, int) == 42
    assert len(played.requests) == 2 and kept(at()) == 1


@pytest.mark.parametrize(("reply", "reason"), GARBAGE.values(), ids=list(GARBAGE))
def test_a_fault_that_stays_stops_with_a_sentence(played, at, reply, reason):
    played.says(reply)
    sentence = rf"{played.url} gave no usable answer \(3 of 3 attempts; the last: {reason}.*check the URL, the model m"
    with pytest.raises(ValueError, match=sentence):
        ask(at(), QUESTION, int)
    assert len(played.requests) == 3 and kept(at()) == 0


def test_a_fault_is_skipped_on_demand_and_asked_again_in_the_next_run(played, at, caplog):
    played.says((500, {}, b"oops"))
    assert ask(at(on_failure="skip"), QUESTION, int) is None
    assert "gave no usable answer" in caplog.text
    played.says("42")
    assert ask(at(on_failure="skip"), QUESTION, int) == 42
    assert len(played.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_for_good_is_not_repeated(played, at, status):
    played.says((status, {}, b"no such model"))
    with pytest.raises(ValueError, match=rf"1 of 3 attempts; the last: HTTP {status}: 'no such model'.*OPENAI_API_KEY"):
        ask(at(), QUESTION, int)
    assert len(played.requests) == 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait, of which none is waited."""
    found: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=found.append))
    return found


def test_waits_double_with_jitter(played, at, waits):
    played.says((500, {}, b""), (500, {}, b""), (500, {}, b""), "42")
    ask(at(attempts=4, first_wait_s=10), QUESTION, int)
    for wait, least in zip(waits, (10, 20, 40), strict=True):  # up to first_wait_s at random on top
        assert least <= wait <= least + 10


def test_growing_waits_have_an_end(played, at, waits):
    played.says(*[(500, {}, b"")] * 4, "42")
    ask(at(attempts=5, first_wait_s=5, longest_wait_s=6), QUESTION, int)
    assert len(waits) == 4 and waits[0] >= 5 and all(6 <= wait <= 6 + 5 for wait in waits[1:])


@pytest.mark.parametrize("asked", [lambda: "300", lambda: formatdate(time.time() + 300, usegmt=True)])
def test_a_wait_that_the_endpoint_asks_for_is_kept_to(played, at, waits, asked):
    played.says((429, {"Retry-After": asked()}, b""), "42")
    assert ask(at(), QUESTION, int) == 42
    assert len(waits) == 1 and 240 < waits[0] <= 300


def test_a_dead_port(at):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=rf"{url} gave no usable answer \(3 of 3 attempts; the last: ConnectionError"):
        ask(at(url=url), QUESTION, int)


def test_an_endpoint_that_hangs(played, at):
    played.says("42")
    played.pause_s = 0.4
    with pytest.raises(ValueError, match="2 of 2 attempts; the last: ReadTimeout"):
        ask(at(timeout_s=0.1, attempts=2), QUESTION, int)


def test_no_endpoint_named(at):
    with pytest.raises(ValueError, match="No endpoint is named; set its URL, such as https"):
        ask(at(url=""), QUESTION, int)
    with pytest.raises(ValueError, match="url"):
        at(url="localhost:8000")
    with pytest.raises(ValueError, match="ulr"):
        at(ulr="")


def test_a_broken_key_is_never_shown(played, at, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "ses\name")
    with pytest.raises(ValueError, match="key in OPENAI_API_KEY holds characters") as caught:
        ask(at(), QUESTION, int)
    assert "ses" not in str(caught.value) and not played.requests


def test_a_damaged_cache_file_is_asked_for_again(played, at):
    played.says("42")
    ask(at(), QUESTION, int)
    (file,) = at().cache.rglob("*.json")
    file.write_bytes(file.read_bytes()[:-1])
    assert ask(at(), QUESTION, int) == 42 and len(played.requests) == 2
    assert ask(at(), QUESTION, int) == 42 and len(played.requests) == 2


def test_a_cache_that_cannot_be_written(played, at, tmp_path):
    played.says("42")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be kept in .*file.*make room, or name another cache"):
        ask(at(cache=tmp_path / "file"), QUESTION, int)


def test_many_threads_ask_the_same(played, at):
    played.says("42")
    answers: list[int | None] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(at(), QUESTION, int))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 16
    assert [path.suffix for path in at().cache.rglob("*") if path.is_file()] == [".json"]


def test_a_picture_is_described(played, at):
    played.says("I'm sorry, I can't help with that.", "A dog\nin a park", "dog", '"A dog runs through a park."')
    sentence = describe_picture(at(attempts=4), picture(), subject="dog")
    assert sentence == "A dog runs through a park." and len(played.requests) == 4
    question, image = played.requests[0]["messages"][0]["content"]
    assert question["text"].endswith("It has to mention the dog.") and image["type"] == "image_url"
    assert describe_picture(at(), picture(), subject="dog") == sentence and len(played.requests) == 4
