"""`evaluate` on tiny models: pictures that repeat, rows that differ as they should, scores and table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_alike, pixels
from ipadapter_instruct_core.checkpoint import load, save
from ipadapter_instruct_core.config import Base, InstructionEncoder
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from safetensors.torch import load_file
from shards_of_photographs import save_shards
from tiny_base import OPEN_CLIP, WIDTH, save_open_clip
from torch.nn.functional import cosine_similarity
from training.datasets.index import Shards
from training.datasets.sample import Sample, encode_picture
from training.datasets.shards import MANIFEST, Tally, write_shard
from training.evaluate import evaluate
from training.evaluate.evaluate import EvaluateConfig
from training.evaluate.index import read_index
from training.files import write_json
from training.instructions import UNSEEN, load_bank
from training.train.adapter import start_adapter
from training.train.validation import Validator

TASKS = ("style", "object", "everything")


def trained(start: Path, out: Path, seed: int, encoder: InstructionEncoder = InstructionEncoder.CLIP_L) -> Path:
    """An instruct adapter that does something, as after training."""
    widths = {"image": OPEN_CLIP["vision_cfg"]["width"], "instruction": WIDTH, "prompt": WIDTH, "text": WIDTH}
    adapter = start_adapter(start, "released", widths, load(start).config.layers, Base.SD15, encoder, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    save(out, adapter)
    return out


@pytest.fixture(scope="module")
def adapters(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, start = tmp_path_factory.mktemp("adapters"), workshop / "start.safetensors"
    return {
        "plain": start,
        **{n: trained(start, folder / f"{n}.safetensors", s) for n, s in (("all", 1), ("style", 2))},
    }


def config(workshop: Path, out: Path, rows: dict[str, dict[str, Path]], **changes: object) -> EvaluateConfig:
    values = {
        "data": [workshop / "data" / task for task in TASKS],
        "base": workshop / "base",
        "image_encoder": workshop / "clip",
        "scorer": workshop / "clip",
        "resolution": 64,
        "steps": 3,
        "samples": 2,
        "device": "cpu",
    }
    return EvaluateConfig(**values | {"rows": rows, "out": out} | changes)


@pytest.fixture(scope="module")
def rows(adapters: dict[str, Path]) -> dict[str, dict[str, Path]]:
    return {"IPAdapter+": {"all": adapters["plain"]}, "Ours": {"all": adapters["all"], "style": adapters["style"]}}


@pytest.fixture(scope="module")
def evaluated(workshop: Path, rows: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate.run(config(workshop, out, rows))
    return out


def rows_of(out: Path, workshop: Path) -> dict:
    """Scores by the workshop's CLIP."""
    return json.loads((out / "scores.json").read_text())["scorers"][str(workshop / "clip")]


def picture(out: Path, row: str, task: str, index: int = 0) -> np.ndarray:
    return pixels((out / row / task / f"{index:05d}.jpg").read_bytes())


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a - b).mean()) > 2


def made(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.jpg"))}


def test_every_row_has_its_pictures_of_every_task(workshop: Path, evaluated: Path) -> None:
    names = {
        f"{row}/{task}/{n:05d}.jpg" for row in ("IPAdapter+", "Ours", "conditions") for task in TASKS for n in (0, 1)
    }
    assert made(evaluated).keys() == names
    for task in TASKS:
        condition = pixels((evaluated / "conditions" / task / "00001.jpg").read_bytes())
        shard = Shards([workshop / "data" / task / "validation-00000.tar"], Tally(0.0))
        assert_alike(condition, pixels(shard[1]["condition"]))
        parts = [picture(evaluated, row, task, n) for row in ("IPAdapter+", "Ours") for n in (0, 1)]
        assert all(part.shape == (64, 64, 3) and part.std() > 5 for part in parts)
        assert all(differ(a, b) for n, a in enumerate(parts) for b in parts[:n])


def test_the_scores_are_those_of_the_pictures(workshop: Path, evaluated: Path) -> None:
    """CLIP-I of the object task, by open_clip itself on the files."""
    from open_clip import CLIP
    from open_clip.transform import image_transform

    model = CLIP(**OPEN_CLIP).eval()
    model.load_state_dict(load_file(workshop / "clip" / "open_clip_model.safetensors"))
    look = image_transform(32, is_train=False)

    def embedding(path: Path) -> torch.Tensor:
        with torch.no_grad(), Image.open(path) as image:
            return model.encode_image(look(image)[None])[0]

    content = rows_of(evaluated, workshop)
    for row in ("IPAdapter+", "Ours"):
        pairs = [
            (
                embedding(evaluated / row / "object" / f"{n:05d}.jpg"),
                embedding(evaluated / f"conditions/object/{n:05d}.jpg"),
            )
            for n in (0, 1)
        ]
        expected = np.mean([float(cosine_similarity(a, b, dim=0)) for a, b in pairs])
        assert content[row]["object"]["CLIP-I"]["mean"] == pytest.approx(expected, abs=0.02)
        assert content[row]["object"]["CLIP-I"]["count"] == 2
    assert content["Ours"].keys() == set(TASKS)
    assert json.loads((evaluated / "scores.json").read_text())["settings"]["seed"] == "0"


def test_the_table_has_our_rows_above_the_papers(workshop: Path, evaluated: Path) -> None:
    lines = (evaluated / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in cells[2:4]] == ["IPAdapter+", "Ours"] and "(paper)" in cells[4][0]
    assert len(cells[0]) == 11 and all(len(row) == 11 for row in cells)
    scores = rows_of(evaluated, workshop)["Ours"]["everything"]
    assert cells[3][1].startswith(f"{scores['CLIP-I']['mean']:.4f}<br>[{scores['CLIP-I']['low']:.4f}, ")
    assert cells[3][7] == "–"  # composition, of which there are no samples
    assert "over 2 pictures a task, and 95 % bootstrap interval over the 2 people or photographs" in "\n".join(lines)


def test_each_scorer_has_a_table_and_one_should_be_another_than_the_adapters_encoder(
    workshop: Path, rows: dict[str, dict[str, Path]], evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, told = save_open_clip(tmp_path / "other", seed=9), "The only scorer is the encoder that the adapters read"
    evaluate.run(config(workshop, tmp_path / "out", rows, scorer=[workshop / "clip", other]))
    assert told not in caplog.text
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["scorers"]
    assert list(found) == [str(workshop / "clip"), str(other)]
    assert found[str(workshop / "clip")] == rows_of(evaluated, workshop)
    first, second = ({row: of["object"]["CLIP-I"]["mean"] for row, of in found[name].items()} for name in found)
    assert all(abs(first[row] - second[row]) > 1e-3 for row in rows)
    tables = (tmp_path / "out" / "table.md").read_text()
    assert [line for line in tables.splitlines() if line.startswith("Scored")] == [f"Scored by {n}:" for n in found]
    assert tables.count("| Ours |") == 2
    evaluate.run(config(workshop, tmp_path / "out", rows))  # the pictures stay
    assert told in caplog.text and list(json.loads((tmp_path / "out" / "scores.json").read_text())["scorers"]) == [
        str(workshop / "clip")
    ]


def test_intervals_are_of_groups(workshop: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Four pictures of two people; of one person alone nothing can be said."""
    folder = tmp_path / "data" / "style"
    folder.mkdir(parents=True)
    shard = Shards([workshop / "data" / "style" / "train-00000.tar"], Tally(0.0))
    samples = [replace(Sample.from_members(shard[n]), group="ab"[n % 2]) for n in range(4)]
    for count, groups in ((4, 2), (1, 1)):
        write_shard(folder / "validation-00000.tar", [(f"{n:09d}", one.members()) for n, one in enumerate(samples)])
        write_json(folder / MANIFEST, {"shards": [{"name": "validation-00000.tar", "samples": 4, "sha256": "x"}]})
        out, row = tmp_path / f"out-{count}", {"Ours": {"all": adapters["all"]}}
        evaluate.run(config(workshop, out, row, data=[folder], samples=count, steps=1))
        score = rows_of(out, workshop)["Ours"]["style"]["CLIP-P"]
        assert (score["count"], score["groups"]) == (count, groups)
        assert (score["low"] is None) == (groups == 1)


def test_the_same_seed_makes_the_same_pictures(
    workshop: Path, rows: dict[str, dict[str, Path]], evaluated: Path, tmp_path: Path
) -> None:
    evaluate.run(config(workshop, tmp_path / "again", rows))
    assert made(tmp_path / "again") == made(evaluated)
    evaluate.run(config(workshop, tmp_path / "other", rows, seed=1))
    assert all(
        differ(picture(evaluated, row, task), picture(tmp_path / "other", row, task)) for row in rows for task in TASKS
    )


def test_a_batchs_cut_changes_no_picture(
    workshop: Path, rows: dict[str, dict[str, Path]], evaluated: Path, tmp_path: Path
) -> None:
    evaluate.run(config(workshop, tmp_path / "ones", rows, batch_size=1))
    for row in rows:
        for task in TASKS:
            assert_alike(picture(tmp_path / "ones", row, task, 1), picture(evaluated, row, task, 1), 0.5)


def test_no_picture_is_made_twice(
    workshop: Path, rows: dict[str, dict[str, Path]], evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, batches, write, written = tmp_path / "out", [], evaluate._keep, []
    batch_of = evaluate.picture_batch
    monkeypatch.setattr(evaluate, "picture_batch", lambda *a: batches.append(a[3:]) or batch_of(*a))

    def killed(path: Path, image: Image.Image) -> None:
        written.append(path)
        write(path, image)
        if len(written) == 8:  # just after the fourth picture
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config(workshop, out, rows, batch_size=1))
    assert len(batches) == 4
    monkeypatch.setattr(evaluate, "_keep", write)
    batches.clear()
    evaluate.run(config(workshop, out, rows, batch_size=1))
    assert len(batches) == 12 - 4
    assert made(out).keys() == made(evaluated).keys()
    index = read_index(out)
    assert sorted((p.row, p.task.value, p.index) for p in index) == sorted(
        (row, task, n) for row in rows for task in TASKS for n in (0, 1)
    )
    batches.clear()
    tables = (out / "table.md").read_bytes()
    evaluate.run(config(workshop, out, rows, batch_size=3))
    assert batches == [] and (out / "table.md").read_bytes() == tables


def test_a_row_may_have_an_adapter_for_each_task(
    workshop: Path, adapters: dict[str, Path], evaluated: Path, tmp_path: Path
) -> None:
    evaluate.run(
        config(workshop, tmp_path / "out", {"joint": {"all": adapters["all"]}, "one": {"style": adapters["style"]}})
    )
    for task, alike in (("object", True), ("style", False)):
        assert np.array_equal(picture(evaluated, "Ours", task), picture(tmp_path / "out", "joint", task)) == alike
    assert np.array_equal(picture(evaluated, "Ours", "style"), picture(tmp_path / "out", "one", "style"))
    assert [path.name for path in (tmp_path / "out" / "one").iterdir()] == ["style"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert next(line for line in table.splitlines() if line.startswith("| one ")).count("–") == 8


def bare_picture(workshop: Path, prompt: str, seed: int) -> np.ndarray:
    """The base model's own, by diffusers' pipeline."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(workshop / "base")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))[None]
    image = pipe(prompt, num_inference_steps=3, guidance_scale=5.0, latents=latents, height=64, width=64).images[0]
    return pixels(encode_picture(image))


def test_at_weight_zero_every_row_is_the_bare_base(
    workshop: Path, rows: dict[str, dict[str, Path]], evaluated: Path, tmp_path: Path
) -> None:
    """Of tasks with simple and with three-way guidance, whose own scale for text is another."""
    evaluate.run(config(workshop, tmp_path / "out", rows, weight=0.0))
    for task in TASKS:
        prompt = next(p.prompt for p in read_index(tmp_path / "out") if p.task.value == task and p.index == 1)
        expected = bare_picture(workshop, prompt, seed=1)
        for row in rows:
            assert_alike(picture(tmp_path / "out", row, task, 1), expected, 0.5)
            assert differ(picture(evaluated, row, task, 1), expected)


def test_rewordings_are_further_pictures_that_are_not_scored(
    workshop: Path, adapters: dict[str, Path], evaluated: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate.run(config(workshop, out, {"Ours": {"all": adapters["all"]}}, rewordings=2))
    found = {picture.index: picture for picture in read_index(out) if picture.task is Task.OBJECT}
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    bank = load_bank(UNSEEN)[Task.OBJECT]
    for index, original in ((2, 0), (3, 0), (4, 1), (5, 1)):
        assert found[index].condition == found[original].condition and found[index].prompt == found[original].prompt
        assert found[index].instruction != found[original].instruction
        assert differ(picture(out, "Ours", "object", index), picture(out, "Ours", "object", original))
    assert all("object" not in found[n].instruction and found[n].instruction not in bank for n in found)
    assert all(("astronaut", "chelsea")[n % 2] in found[n].instruction for n in (0, 1))  # the samples' subjects
    assert rows_of(out, workshop)["Ours"]["object"]["CLIP-P"]["count"] == 2
    assert np.array_equal(picture(out, "Ours", "object", 1), picture(evaluated, "Ours", "object", 1))


@pytest.mark.parametrize("chosen", ["fixed", "bank", "unseen"])
def test_instructions_come_from_where_they_are_asked_for(
    workshop: Path, adapters: dict[str, Path], tmp_path: Path, chosen: str
) -> None:
    data = [workshop / "data" / "style"]
    out = tmp_path / "out"
    evaluate.run(config(workshop, out, {"Ours": {"all": adapters["all"]}}, instructions=chosen, data=data, steps=1))
    known = {"fixed": ["use the style"], "bank": load_bank()[Task.STYLE], "unseen": load_bank(UNSEEN)[Task.STYLE]}
    words = [picture.instruction for picture in read_index(out)]
    assert all(word in known[chosen] for word in words) and len(set(words)) == (1 if chosen == "fixed" else 2)


def test_a_style_without_a_caption_has_no_clip_s(
    workshop: Path, adapters: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sec. 4.1 subtracts the condition's own text, which the target's prompt is not; where they are one, it is."""

    def bare(folder: Path, known: int = 0) -> Path:
        """The task's shards without captions, but for the first ``known`` samples."""
        source, path = workshop / "data" / folder.name, folder / "validation-00000.tar"
        shard = Shards([source / path.name], Tally(0.0))
        samples = [Sample.from_members(shard[n]) for n in range(2)]
        samples[known:] = [replace(sample, condition_prompt="") for sample in samples[known:]]
        folder.mkdir(parents=True)
        write_shard(path, [(f"{n:09d}", sample.members()) for n, sample in enumerate(samples)])
        shutil.copy(source / MANIFEST, folder)
        return folder

    def scores(out: Path, **changes: object) -> dict:
        evaluate.run(config(workshop, out, {"Ours": {"all": adapters["all"]}}, steps=1, **changes))
        return rows_of(out, workshop)["Ours"]

    found = scores(tmp_path / "out", data=[bare(tmp_path / name) for name in ("style", "everything")])
    assert found["style"].keys() == {"CLIP-P"} and found["everything"].keys() == {"CLIP-I", "CLIP-T"}
    ours = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| Ours"))
    assert ours.split("|")[4].strip() == "–" and ours.split("|")[5].strip() != "–"
    assert [message for message in caplog.messages if "CLIP" in message] == [
        "2 of 2 style samples do not say what their condition shows, which CLIP-S reads: it leaves them out; build "
        "with captions or --prompts endpoint to have them."
    ]
    part = scores(tmp_path / "part", data=[bare(tmp_path / "half" / "style", known=1)])["style"]
    one = scores(tmp_path / "one", data=[workshop / "data" / "style"], samples=1)["style"]
    assert part["CLIP-S"]["count"] == 1 and part["CLIP-P"]["count"] == 2
    assert part["CLIP-S"]["mean"] == pytest.approx(one["CLIP-S"]["mean"], abs=0.02)


def test_validation_scores_no_style_without_a_caption() -> None:
    class Numbers:
        """An embedder in two dimensions: pictures and texts are their own embeddings."""

        images = texts = staticmethod(lambda things: torch.tensor([[1.0, len(str(thing))] for thing in things]))

    validator = Validator.__new__(Validator)
    validator.embedder = Numbers()
    known = Sample(b"", b"", "a prompt", Task.STYLE, "1", "1", condition_prompt="a caption")
    bare = replace(known, condition_prompt="")
    whole = validator._scores(Task.STYLE, ["c"], ["made"], [known])
    assert whole.keys() == {"CLIP-S", "CLIP-P"}
    both = validator._scores(Task.STYLE, ["c", "c"], ["made", "made"], [bare, known])
    assert both["CLIP-S"] == pytest.approx(whole["CLIP-S"]) and len(both["CLIP-P"]) == 2
    assert validator._scores(Task.STYLE, ["c"], ["made"], [bare]).keys() == {"CLIP-P"}
    itself = replace(bare, target=None, task=Task.EVERYTHING)
    assert validator._scores(Task.EVERYTHING, ["c"], ["made"], [itself]).keys() == {"CLIP-I", "CLIP-T"}


def test_tasks_beyond_the_papers_have_pictures_but_no_scores(
    workshop: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    data = [save_shards(tmp_path / "poses", Task.POSE, count=0), workshop / "data" / "style"]
    out = tmp_path / "out"
    evaluate.run(config(workshop, out, {"Ours": {"all": adapters["all"]}}, data=data, steps=1))
    assert picture(out, "Ours", "pose").std() > 5
    assert rows_of(out, workshop)["Ours"].keys() == {"style"}
