"""`build` with prompts from an endpoint."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from builds import (
    Turned,
    build,
    coco,
    files_of,
    journeydb,
    samples_of,
    styles,
)
from sources import photograph, save


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI-compatible server that describes every picture in its own words, and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            picture = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:8]
            answer = json.dumps({"choices": [{"message": {"content": f"A photo called {picture} of something."}}]})
            self.send_response(500 if self.path.startswith("/broken") else 200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_prompts_from_an_endpoint_are_asked_for_once(tmp_path, endpoint):
    url, asked = endpoint
    source = coco(tmp_path / "source")
    settings = {"prompts": "endpoint", "endpoint": {"url": f"{url}/v1", "cache": tmp_path / "cache"}}
    build(source, tmp_path / "a", **settings)
    assert len(asked) == 12
    made = samples_of(tmp_path / "a", "train")
    assert all(sample.prompt.startswith("A photo called ") for sample in made)
    assert len({sample.prompt for sample in made}) == len(made)
    subjects = [body["messages"][0]["content"][0]["text"].rpartition("mention the ")[2].rstrip(".") for body in asked]
    assert sorted(subjects) == sorted(["cat", "cup", "person", "motorcycle", "building", "potted plant"] * 2)
    build(source, tmp_path / "b", **settings)
    assert len(asked) == 12, "the second build asks nothing"
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert url not in (tmp_path / "a" / "manifest.json").read_text()


def test_an_endpoint_describes_the_condition_of_a_style(tmp_path, endpoint):
    url, asked = endpoint
    maker = Turned()
    settings = {"prompts": "endpoint", "endpoint": {"url": url, "cache": None}}
    build(styles(tmp_path / "source"), tmp_path / "out", maker, **settings)
    assert len(asked) == 12
    for sample in samples_of(tmp_path / "out", "train"):
        assert sample.condition_prompt.startswith("A photo called") and not sample.prompt.startswith("A photo")
    assert all(content.startswith("A photo called") for _, _, contents in maker.asked for content in contents)


def test_styles_without_captions_are_told(tmp_path, endpoint, caplog):
    source = styles(tmp_path / "source")
    said = "style samples have no caption of their picture: from these InstantStyle subtracts no content, and CLIP-S"
    maker = Turned()
    build(source, tmp_path / "bare", maker, validation=0)
    bare = {content for _, _, contents in maker.asked for content in contents} == {""}
    assert bare and f"12 of 12 {said}" in caplog.text
    caplog.clear()
    build(source, tmp_path / "told", Turned(), prompts="endpoint", endpoint={"url": endpoint[0], "cache": None})
    for number in range(3):
        save(tmp_path / "own" / f"{number}.png", photograph("cat"))
        (tmp_path / "own" / f"{number}.txt").write_text("a cat")
    source["pictures"] = tmp_path / "own"
    build(source, tmp_path / "captioned", Turned(), validation=0)
    assert said not in caplog.text
    (tmp_path / "own" / "1.txt").unlink()
    build(source, tmp_path / "partly", Turned(), validation=0)
    assert f"1 of 3 {said}" in caplog.text


def test_an_endpoint_that_fails_stops_or_is_skipped_as_asked(tmp_path, endpoint):
    url, _ = endpoint
    source = journeydb(tmp_path / "source", count=4)
    broken = {"url": f"{url}/broken", "attempts": 1, "cache": None}
    with pytest.raises(ValueError, match="gave no usable answer"):
        build(source, tmp_path / "a", prompts="endpoint", endpoint=broken)
    assert not list((tmp_path / "a").glob("*.tar"))
    with pytest.raises(ValueError, match="4 of 4 items could not be used .*the endpoint gave no prompt"):
        build(source, tmp_path / "b", validation=0, prompts="endpoint", endpoint={**broken, "on_failure": "skip"})
