"""The bank of instructions: size, variety, the paper's keyword rule; and its extension through an endpoint."""

import json
import re
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ipadapter_instruct_core.tasks import PHRASES, Task
from training.instructions import BANK, KEYWORDS, UNSEEN, keeps_to_its_task, load, load_bank, plain, with_subject
from training.instructions.choose import drawn, wordings
from training.instructions.extend import InstructionsConfig, run

TASKS = [Task.EVERYTHING, Task.STYLE, Task.COMPOSITION, Task.OBJECT, Task.FACE]
# Written out once more, so that a hole in the module's own patterns shows.
STEMS = {
    Task.EVERYTHING: r"everything",
    Task.STYLE: r"\w*styl(e|i)\w*",
    Task.COMPOSITION: r"\w*compos(e|ing|ition)\w*",
    Task.OBJECT: r"object\w*",
    Task.FACE: r"(face|faces|faced|facing|facial\w*|identity|identities)",
}


def bare(phrase: str) -> str:
    """Letters and digits only: independent of the module's own `plain`."""
    return "".join(letter for letter in phrase.lower() if letter.isalnum())


@pytest.fixture(params=TASKS, ids=lambda task: task.value)
def task(request) -> Task:
    return request.param


def test_the_bank_is_the_papers_five_tasks():
    assert list(load_bank()) == list(KEYWORDS) == TASKS


def test_a_task_has_a_thousand_distinct_wordings(task):
    assert len({bare(phrase) for phrase in load(task)}) == len(load(task)) >= 1000


def test_no_wording_serves_two_tasks():
    counted = Counter(bare(phrase) for phrases in load_bank().values() for phrase in phrases)
    assert max(counted.values()) == 1


@pytest.mark.parametrize("folder", [BANK, UNSEEN])
def test_no_wording_holds_another_tasks_keyword(task, folder):
    others = "|".join(stem for other, stem in STEMS.items() if other is not task)
    assert [phrase for phrase in load(task, folder) if re.search(rf"\b({others})\b", phrase, re.IGNORECASE)] == []
    assert all(keeps_to_its_task(task, phrase) for phrase in load(task, folder))


@pytest.mark.parametrize("folder", [BANK, UNSEEN])
def test_an_object_wording_has_one_place_for_the_subject(folder):
    for phrase in load(Task.OBJECT, folder):
        assert phrase.lower().count("object") == 1
        assert (
            "zebra" in with_subject(phrase, "zebra").lower() and "object" not in with_subject(phrase, "zebra").lower()
        )


def test_lengths_are_spread(task):
    lengths = sorted(len(phrase.split()) for phrase in load(task))
    tenth, ninetieth = lengths[len(lengths) // 10], lengths[9 * len(lengths) // 10]
    assert tenth <= 6 and ninetieth >= 16 and 26 <= lengths[-1] <= 40


def test_beginnings_and_words_vary(task):
    phrases = load(task)
    firsts = Counter(plain(phrase).split()[0] for phrase in phrases)
    assert len(firsts) >= 100 and max(firsts.values()) < 0.15 * len(phrases)
    assert len({word for phrase in phrases for word in plain(phrase).split()}) >= 350
    assert sum(phrase.endswith("?") for phrase in phrases) >= 60


def test_a_wording_is_one_clean_line(task):
    for phrase in load(task) + load(task, UNSEEN):
        assert re.fullmatch(r"[A-Za-zäöüéè' ,.;:?!-]+", phrase) and "  " not in phrase, phrase
        assert not re.search(r" [,.;:?!]|\b(\w+) \1\b|[,;:]$|\ba [aeio]|\ban [^aeiou]", phrase.lower()), phrase


def test_unseen_wordings_are_far_from_the_bank(task):
    bank = [set(plain(phrase).split()) for phrase in load(task)]
    unseen = load(task, UNSEEN)
    assert len({bare(phrase) for phrase in unseen}) == 50
    for words in (set(plain(phrase).split()) for phrase in unseen):
        assert max(len(words & other) / len(words | other) for other in bank) < 0.7


def test_the_fixed_wordings_are_the_first_of_the_nodes():
    for task in TASKS:
        assert list(wordings("fixed", task)) == [PHRASES[task][0]] and PHRASES[task][0] in load(task)


@pytest.mark.parametrize("task", [Task.STYLE, Task.OBJECT, Task.POSE])
def test_each_kind_of_wording_is_drawn_from_its_own(task):
    """Those that the paper does not train have the core's phrases in every bank."""
    known = load_bank().get(task, PHRASES[task]), load_bank(UNSEEN).get(task, PHRASES[task])
    for kind, expected in {"fixed": [PHRASES[task][0]], "bank": known[0], "unseen": known[1]}.items():
        found = {drawn(kind, task, "", seed) for seed in range(40)}
        assert found <= set(expected) and len(found) >= min(len(expected), 3)
    named = drawn("fixed", task, "red boat", 0)
    assert named == ("use the red boat" if task is Task.OBJECT else PHRASES[task][0])


@pytest.mark.parametrize(
    ("task", "phrase", "keeps"),
    [
        (Task.STYLE, "Restyle it, stylishly, in these styles", True),
        (Task.EVERYTHING, "everything but the Style", False),
        (Task.COMPOSITION, "a restyled picture", False),
        (Task.COMPOSITION, "stylised", False),
        (Task.STYLE, "well composed", False),
        (Task.FACE, "compositional", False),
        (Task.STYLE, "two objects", False),
        (Task.STYLE, "the object's style", False),
        (Task.OBJECT, "facing left", False),
        (Task.OBJECT, "the FACES", False),
        (Task.STYLE, "facial style", False),
        (Task.OBJECT, "the object's identity", False),
        (Task.FACE, "identity", True),
        (Task.STYLE, "everything", False),
        (Task.EVERYTHING, "every surface and every interface, with a stylus", True),
        (Task.OBJECT, "an objective lens", True),
    ],
)
def test_the_keyword_rule(task, phrase, keeps):
    assert keeps_to_its_task(task, phrase) is keeps


@pytest.mark.parametrize(
    ("phrase", "subject", "expected"),
    [
        ("use the object", "dog", "use the dog"),
        ("use the object", "", "use the object"),
        ("use the style", "dog", "use the style"),
        ("Object only", "traffic light", "Traffic light only"),
        ("take an object like this", "dog", "take a dog like this"),
        ("An object", "umbrella", "An umbrella"),
        ("an object", "unicycle", "a unicycle"),
        ("an object", "the hour glass", "an hour glass"),
        ("an object", "skis", "skis"),
        ("This object is mine", "scissors", "These scissors are mine"),
        ("that object has gone", "wine glass", "that wine glass has gone"),
        ("the object's colours", "skis", "the skis' colours"),
        ("the object's colours", "people", "the people's colours"),
        ("this object", "bus", "this bus"),
        ("this object", "pair of shoes", "this pair of shoes"),
        ("use the object", r"\1 dog", r"use the \1 dog"),
        ("no objection", "dog", "no objection"),
    ],
)
def test_the_subject_takes_the_objects_place(phrase, subject, expected):
    assert with_subject(phrase, subject) == expected


def test_a_missing_damaged_or_empty_bank(tmp_path):
    with pytest.raises(ValueError, match=r"style.txt cannot be read .*write them there, one a line"):
        load(Task.STYLE, tmp_path)
    (tmp_path / "style.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"style.txt cannot be read"):
        load(Task.STYLE, tmp_path)
    (tmp_path / "style.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"style.txt holds no instruction"):
        load(Task.STYLE, tmp_path)


@pytest.fixture
def chat():
    """An endpoint that answers with the given texts in turn, the last for ever: (its URL, texts, questions)."""
    texts: list[str] = []
    questions: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            questions.append(body["messages"][0]["content"])
            text = texts.pop(0) if len(texts) > 1 else texts[0]
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", texts, questions
    server.shutdown()
    server.server_close()
    thread.join()


def config(url: str, out: Path, **changes) -> InstructionsConfig:
    endpoint = {"url": url, "attempts": 2, "first_wait_s": 0.01}
    return InstructionsConfig(**{"out": out, "endpoint": endpoint, "stale_batches": 2, **changes})


def test_new_wordings_are_filtered_and_added(chat, tmp_path, capsys):
    url, texts, questions = chat
    known, unseen = load(Task.OBJECT)[0], load(Task.OBJECT, UNSEEN)[0]
    wrap = "Wrap up the object"
    first = [wrap, "wrap up the object!", known.upper(), unseen, "the style of the object", "a dog", "?"]
    second = ["object meets object", "object" + " very" * 40, " Fetch\n the object ", "Hug the object", "An object"]
    texts += [f"Sure:\n```json\n{json.dumps(first)}\n```", "no list", json.dumps(second)]
    run(config(url, tmp_path / "bank", task="object", count=3))
    added = [wrap, "Fetch the object", "Hug the object"]
    assert load(Task.OBJECT, tmp_path / "bank") == [*load(Task.OBJECT), *added]
    assert capsys.readouterr().out.startswith(f"object: 3 new wordings, {len(load(Task.OBJECT)) + 3} in all, in ")
    assert len(questions) == 3 and [path.name for path in (tmp_path / "bank").iterdir()] == ["object.txt"]
    assert "Do not use the words everything, style, composition, face, identity in any form" in questions[0]


def test_it_stops_when_nothing_new_comes_and_keeps_what_did(chat, tmp_path):
    url, texts, questions = chat
    texts += ['["Wear their manner"]', "[]"]
    with pytest.raises(ValueError, match=r"no new wording for style in 2 requests, after 1 of 9 were added"):
        run(config(url, tmp_path, task="style", count=9))
    assert load(Task.STYLE, tmp_path)[-1] == "Wear their manner" and len(questions) == 3


def test_rubbish_ends_in_a_sentence_and_leaves_the_bank_alone(chat, tmp_path):
    url, texts, _ = chat
    texts += ["[1, 2]"]
    shutil.copy(BANK / "style.txt", tmp_path)
    with pytest.raises(ValueError, match=r"no usable answer \(2 of 2 attempts; the last: not a JSON list of strings"):
        run(config(url, tmp_path, task="style"))
    assert (tmp_path / "style.txt").read_bytes() == (BANK / "style.txt").read_bytes()


def test_all_tasks_extend_in_turn(chat, tmp_path, capsys):
    url, texts, _ = chat
    texts += [json.dumps(["Wander through the thing called object", "Wander through it"])]
    run(config(url, tmp_path, count=1))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [task.value for task in TASKS]


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValueError, match="counts"):
        InstructionsConfig(counts=3)
