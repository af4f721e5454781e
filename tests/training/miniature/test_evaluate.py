"""The miniature's evaluation: it counts what pictures show, and makes them as told. Its models here are random."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.adapter import Adapter
from ipadapter_instruct_core.checkpoint import save
from ipadapter_instruct_core.config import AdapterConfig, Base, InstructionEncoder
from ipadapter_instruct_core.encoders import OpenClip
from ipadapter_instruct_core.tasks import Task
from training.miniature.expand import write
from training.miniature.judged import cases, curves, evaluate, painting, readout, report
from training.miniature.judged.cases import Rate
from training.miniature.models import clip, oracle, weights
from training.miniature.models.autoencoder import Autoencoder
from training.miniature.models.base import TEXT_WIDTH, TextToImage
from training.miniature.world.drawn import to_tensor
from training.miniature.world.factors import Factors
from training.miniature.world.samples import LEFT_TO_CONDITION, TASKS
from training.miniature.world.style import render

COUNT = 40


def test_intervals_are_those_of_the_literature() -> None:
    """Newcombe's two papers of 1998 on intervals, of one proportion and of the difference of two."""
    assert Rate(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Rate(15, 148).interval == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert Rate(0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert cases.difference(Rate(56, 70), Rate(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def rates_of(chosen: list[cases.Case], shown: list[Factors], pictures: np.ndarray) -> dict[str, Rate]:
    """Figures of pictures by an oracle that knows them."""
    return cases.rates(chosen, oracle.labels(shown), to_tensor(pictures))


@pytest.mark.parametrize("task", TASKS)
def test_the_true_targets_do_all_that_is_asked_and_leak_nothing(task: Task) -> None:
    chosen = cases.task_cases(task, COUNT)
    pictures = np.stack([render(case.target) for case in chosen])
    found = rates_of(chosen, [case.target for case in chosen], pictures)
    for aim in report.AIMS[task.value]:
        assert found[aim.figure].share == (0.0 if aim.leak else 1.0), aim
        assert found[aim.figure].total > 0
    left = {"subject", "colour"} if task is Task.OBJECT else set(LEFT_TO_CONDITION.get(task, ()))
    assert not left & {name.removeprefix("prompt ") for name in found if name.startswith("prompt")}
    assert all(case.target.held_out for case in chosen)


@pytest.mark.parametrize("task", TASKS)
def test_conditions_given_back_have_all_of_them_and_leak_everything(task: Task) -> None:
    chosen = cases.task_cases(task, COUNT)
    found = rates_of(chosen, [case.condition for case in chosen], np.stack([case.picture for case in chosen]))
    aims = report.AIMS[task.value]
    assert all(found[aim.figure].share == 1 for aim in aims if aim.leak or aim.figure.startswith("condition"))
    assert ("condition scene" in found) == (task is not Task.OBJECT)  # a cut-out has none
    if task is not Task.EVERYTHING:
        assert all(found[aim.figure].share < 0.5 for aim in aims if aim.figure.startswith("prompt"))


def test_each_figure_counts_the_cases_that_can_show_it() -> None:
    """Three pictures by hand; the first prompt leaves the style, the second agrees in the scene, the third is bare."""
    red_cat = Factors("cat", "poster", "large", "sea", "red")
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    fish = replace(red_cat, subject="fish", colour="teal", scene="night", layout="pair")
    said = ("subject", "layout", "scene", "colour")
    first = cases.Case(Task.STYLE, picture, "", red_cat, fish, said, "", 0)
    second = replace(first, target=replace(fish, scene="sea", colour="red"))
    third = replace(first, said=())
    shown = [fish, replace(red_cat, style="neon"), replace(fish, subject="tree")]
    found = rates_of([first, second, third], shown, np.zeros((3, 64, 64, 3), dtype=np.uint8))
    assert found == {
        "condition subject": Rate(1, 2), "prompt subject": Rate(1, 2),
        "condition style": Rate(2, 3),
        "condition layout": Rate(1, 2), "prompt layout": Rate(1, 2),
        "condition scene": Rate(0, 1), "prompt scene": Rate(2, 2),
        "condition colour": Rate(0, 1), "prompt colour": Rate(2, 2),
        "together": Rate(0, 3),
    }  # fmt: skip
    watched = rates_of([replace(third, watched=("scene",))], [fish], np.zeros((1, 64, 64, 3), dtype=np.uint8))
    assert watched == {"condition style": Rate(1, 1), "condition scene": Rate(0, 1), "together": Rate(0, 1)}
    assert first.unwanted == ("subject", "layout", "scene", "colour")
    assert second.unwanted == ("subject", "layout")


def test_a_plain_background_is_seen_and_a_scene_is_not_taken_for_one() -> None:
    chosen = cases.task_cases(Task.OBJECT, COUNT)
    assert all("scene" not in case.unwanted for case in chosen)
    faint = np.stack([case.picture for case in chosen]).astype(int) + np.random.default_rng(0).integers(-15, 16, 3)
    shown = [case.target for case in chosen]
    assert rates_of(chosen, shown, faint.clip(0, 255).astype(np.uint8))["background"].share == 1


def test_only_known_cases_are_of_combinations_of_training() -> None:
    for task in TASKS:
        assert all(case.target.held_out for case in cases.TRIALS[task.value].cases(20, 0))
        known = cases.TRIALS[f"{task.value}, known"].cases(20, 0)
        assert not any(case.target.held_out for case in known)
        assert task is Task.OBJECT or not any(case.condition.held_out for case in known)


def test_known_combinations_stand_beside_those_held_out() -> None:
    made = {"row": "joint", "wording": "bank", "weight": 0.8}
    hits = {"style": 1, "style, known": 3}
    found = [made | {"trial": trial, "rates": {"condition style": [hits[trial], 4]}} for trial in hits]
    shown = {"wording": "bank", "weight": {task.value: 0.8 for task in TASKS}}
    lines = report.combinations(report.Results({}, shown, found)).splitlines()
    assert lines[2] == "| task |  | joint, held out | joint, known |"
    cells = [report.text(Rate(count, 4)) for count in hits.values()]
    assert lines[4:] == [f"| style | condition style | {cells[0]} | {cells[1]} |"]


def test_cases_come_from_the_seed_and_their_number_alone() -> None:
    for trial in cases.TRIALS.values():
        few, many, others = trial.cases(3, 0), trial.cases(5, 0)[:3], trial.cases(3, 1)
        assert [(case.prompt, case.seed) for case in few] == [(case.prompt, case.seed) for case in many]
        assert [case.condition for case in few] == [case.condition for case in many]
        assert all(np.array_equal(one.picture, other.picture) for one, other in zip(few, many, strict=True))
        assert [case.condition for case in few] != [case.condition for case in others]
        assert {case.seed for case in few}.isdisjoint(case.seed for case in others)


def test_crossed_conditions_are_the_same_for_every_task_and_agree_with_no_prompt() -> None:
    for who, tasks in cases.CROSSED_TASKS.items():
        differing = cases.OF_PEOPLE if who == "people" else cases.OF_THINGS
        for task in tasks:
            for prompt in cases.PROMPTS:
                chosen = cases.crossed_cases(who == "people", task, 10, prompt=prompt)
                first = cases.crossed_cases(who == "people", Task.STYLE, 10)
                assert [case.condition for case in chosen] == [case.condition for case in first]
                assert not any(
                    getattr(c.condition, name) == getattr(c.target, name) for c in chosen for name in differing
                )
                said = {name for case in chosen for name in case.said}
                assert prompt == "whole" or not said & set(cases.WANTED[task])
                assert prompt != "whole" or said >= set(differing)
                assert prompt != "no" or {case.prompt for case in chosen} == {""} and not said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``expanded``, ``weights``, and adapters: joint, plain, single-style; all of random weights."""
    folder = tmp_path_factory.mktemp("miniature")
    torch.manual_seed(0)
    words = torch.tensor(clip.known_words())
    state = OpenClip(clip.CONFIG).clip.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "FOLDER", folder / "weights")
        for model, name in ((TextToImage(), "base"), (Autoencoder(), "autoencoder"), (oracle.Oracle(), "oracle")):
            weights.save(model, name)
        weights.save({**state, clip.TOKENS: state[clip.TOKENS][words], "known_words": words}, "clip")
        write.run(write.ExpandConfig(folder / "expanded", training=True))
    for name, instructed in (("joint", True), ("plain", False), ("single-style", True)):
        save(folder / f"{name}.safetensors", _adapter(folder, instructed))
    return folder


def _adapter(folder: Path, instructed: bool) -> Adapter:
    from training.frozen.base import load_base
    from training.frozen.unet import cross_attentions

    config = AdapterConfig(
        image_width=clip.CONFIG["vision_cfg"]["width"],
        width=64,
        heads=1,
        depth=1,
        token_count=4,
        output_width=TEXT_WIDTH,
        instruction_width=clip.CONFIG["text_cfg"]["width"] if instructed else None,
        prompt_width=None,
        layers=tuple(cross_attentions(load_base(folder / "expanded" / "diffusers").network)),
        base=Base.SD15,
        instruction_encoder=InstructionEncoder.OPEN_CLIP,
    )
    return Adapter(config)


@pytest.fixture
def config(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> evaluate.EvaluateConfig:
    monkeypatch.setattr(weights, "FOLDER", models / "weights")
    rows = {"joint": "joint", "plain": "plain", "single": "single-{task}", "fixed": "joint"}
    rows = {row: str(models / f"{name}.safetensors") for row, name in rows.items()}
    settings = {"count": 2, "steps": 2, "weights": (0.4, 1.0), "crossed": ("joint",), "examples": 1, "device": "cpu"}
    settings["prompts"] = cases.PROMPTS
    return evaluate.EvaluateConfig(rows, tmp_path / "out", models / "expanded", **settings)


def test_a_whole_run_counts_every_picture_and_is_not_made_twice(
    config: evaluate.EvaluateConfig, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.run(config)
    found = json.loads((config.out / report.RESULTS).read_text())["found"]
    assert {one["trial"] for one in found.values()} == set(cases.TRIALS)
    assert {one["row"] for one in found.values() if one["trial"] == "style"} == {*config.rows, report.NO_ADAPTER}
    knows_faces = {one["row"] for one in found.values() if one["trial"] == "face"}
    assert knows_faces == {*config.rows, report.NO_ADAPTER} - {"single"}
    joint = {
        (one["wording"], one["weight"]) for one in found.values() if (one["trial"], one["row"]) == ("style", "joint")
    }
    assert joint == {("bank", 0.8), ("fixed", 0.8), ("unseen", 0.8), ("bank", 0.4), ("bank", 1.0)}
    told = found["style | fixed | fixed | 0.8"], found["style | joint | fixed | 0.8"]
    assert told[0]["rates"] == told[1]["rates"]  # the same file, told the same; the row joint is told the bank's above
    assert found["style | joint | bank | 0.8"]["rates"]["condition style"][1] == config.count
    tables = (config.out / report.TABLES).read_text()
    for heading in ("| style |", "## Joint, single-task and", "## Wordings", "## Weights", "### People, whole prompt"):
        assert heading in tables
    line = tables.split("### Things, no prompt")[1].split("| joint | style | ")[1].split(" |\n")[0]
    assert re.fullmatch(r"[\d.]+ \| \*\*[\d.]+\*\* \| [\d.]+ \| [\d.]+ \| ([\d.]+|–)", line), line
    assert "| joint, held out | joint, known |" in tables
    assert "| task |  | joint | single | fixed | joint − single | joint − fixed |" in tables
    assert (config.out / "pictures.png").stat().st_size > 10_000

    made: list[evaluate.Job] = []
    monkeypatch.setattr(evaluate, "sheet", lambda *_: None)
    pictures_of = evaluate.pictures_of
    monkeypatch.setattr(evaluate, "pictures_of", lambda *given: made.append(given[-1]) or pictures_of(*given))
    evaluate.run(config)
    assert not made
    other = models / "other.safetensors"
    save(other, _adapter(models, True))
    evaluate.run(replace(config, rows={**config.rows, "plain": str(other)}, tables=("tasks",)))
    assert {job.row for job in made} == {"plain"} and len(made) == 7
    with pytest.raises(ValueError, match="made with settings.seed = 0, not 1; give it as it was"):
        evaluate.run(replace(config, seed=1))


def test_crossed_conditions_are_judged_with_the_prompts_that_are_asked_for(config: evaluate.EvaluateConfig) -> None:
    loaded = painting.load_models(config.rows, config.models, torch.device("cpu"))
    for prompts in (("no",), ("open", "whole")):
        planned = evaluate.plan(replace(config, tables=("crossing",), prompts=prompts), loaded)
        assert {job.trial for job in planned} == {*cases.crossed_trials(prompts)}
        assert all(any(f", {prompt} prompt, " in job.trial for prompt in prompts) for job in planned)


def test_pictures_follow_adapter_and_instruction_and_not_the_batch(config: evaluate.EvaluateConfig) -> None:
    loaded = painting.load_models(config.rows, config.models, torch.device("cpu"))
    prepared = painting.Prepared.of(loaded, cases.task_cases(Task.STYLE, 3), batch=3)

    def made(row: str, wording: str = "bank", weight: float = 0.8, **changed: object) -> torch.Tensor:
        job = evaluate.Job("style", row, wording, weight)
        return evaluate.pictures_of(replace(config, **changed), loaded, prepared, job)

    bare = made(report.NO_ADAPTER, weight=0.0)
    assert bare.shape == (3, 3, 64, 64) and bare.std() > 0
    assert (made("joint", weight=0.0) - bare).abs().max() < 1e-4
    joint = made("joint")
    assert not torch.allclose(joint, bare, atol=1e-5)
    assert not torch.allclose(joint, made("joint", "unseen"), atol=1e-7)
    assert (made("joint", batch=2) - joint).abs().max() < 1e-4
    assert not torch.allclose(joint, made("joint", guidance="three-way"), atol=1e-5)
    assert torch.equal(made("plain"), made("plain", guidance="three-way"))


@pytest.mark.usefixtures("config")
def test_curves_are_of_each_snapshot_of_every_run_and_of_what_they_began_with(models: Path, tmp_path: Path) -> None:
    runs = {"joint": ("joint", "joint"), "fixed": ("joint", "fixed"), "single": ("single-style", "single-style")}
    for adapter, run in runs.values():
        for step in (5, 100):
            path = tmp_path / run / curves.SNAPSHOTS / f"step-{step:08d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(models / f"{adapter}.safetensors", path)
    other = tmp_path / "single-long" / curves.SNAPSHOTS / "step-00000200.safetensors"  # of no task: no step of these
    other.parent.mkdir(parents=True)
    shutil.copy(models / "joint.safetensors", other)
    folders = {"joint": str(tmp_path / "joint"), "fixed": str(tmp_path / "fixed")}
    folders["single"] = str(tmp_path / "single-{task}")
    start, out = models / "plain.safetensors", tmp_path / "out"
    curves.run(curves.CurvesConfig(folders, start, out, models / "expanded", count=2, steps=2, device="cpu"))
    found = json.loads((out / report.RESULTS).read_text())["found"].values()
    assert {one["wording"] for one in found if one["row"] == "fixed@100"} == {"fixed"}
    assert {one["wording"] for one in found if one["row"] == "joint@100"} == {"bank"}
    read = curves.read(out, list(folders))
    style, faces = read[Task.STYLE]["condition style"], read[Task.FACE]["condition identity"]
    assert {label: steps for label, (steps, _) in style.items()} == dict.fromkeys(folders, [0, 5, 100])
    assert faces["single"][0] == [0] and faces["joint"][0] == [0, 5, 100]
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in curves.FIGURES)
    with pytest.raises(FileNotFoundError, match="has no snapshots"):
        curves.run(curves.CurvesConfig({"joint": str(tmp_path / "missing")}))


@pytest.mark.usefixtures("config")
def test_factors_are_read_from_states_and_tokens(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A style changes all of a picture: even a CLIP of random weights shows it (chance: 0.125)."""
    monkeypatch.setattr(readout, "COMPONENTS", 30)
    settings = readout.ReadoutConfig(models / "joint.safetensors", models / "expanded", learned=120, asked=60)
    readout.run(settings)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        [where, factor] for where in ("CLIP's states", "the adapter's tokens") for factor in cases.REPLICATED
    ]
    assert all(0 <= float(share) <= 1 for line in lines for share in line[2:])
    assert all(float(share) > 0.5 for share in lines[1][2:]) and float(lines[2][3]) < 1


def test_what_cannot_be_evaluated_is_told(config: evaluate.EvaluateConfig) -> None:
    with pytest.raises(FileNotFoundError, match='no adapter .*missing.* for the row "joint"'):
        evaluate.run(replace(config, rows={"joint": "missing.safetensors"}))
    with pytest.raises(ValueError, match='cannot be named "no adapter"'):
        evaluate.run(replace(config, rows={"no adapter": "missing.safetensors"}))
    with pytest.raises(ValueError, match="--weight names 'faces'; it takes all, everything"):
        evaluate.run(replace(config, weight={"faces": 1.0}))
    with pytest.raises(FileNotFoundError, match="evaluate"):
        report.write(config.out)


def test_tables_say_which_targets_are_met(tmp_path: Path) -> None:
    def found(row: str, trial: str, **rates: list[int]) -> dict[str, object]:
        wording, weight = ("bank", 0.8) if row == "joint" else ("", 0.0 if row == report.NO_ADAPTER else 0.8)
        about = {"trial": trial, "row": row, "wording": wording, "weight": weight, "sha256": row, "device": "cpu"}
        return {**about, "rates": {name.replace("_", " "): counts for name, counts in rates.items()}}

    lines = [
        found("no adapter", "object", condition_subject=[60, 500], condition_style=[20, 500]),
        found("plain", "object", condition_subject=[450, 500], condition_style=[200, 500]),
        found("joint", "object", condition_subject=[399, 500], condition_style=[70, 500], prompt_scene=[350, 500]),
    ]
    shown = {"wording": "bank", "weight": {task.value: 0.8 for task in TASKS}}
    content = {"settings": {"count": 500}, "models": {}, "shown": shown, "found": dict(enumerate(lines))}
    (tmp_path / report.RESULTS).write_text(json.dumps(content))
    tables = report.write(tmp_path).read_text()
    assert "The joint adapter meets 2 of the five tasks' 3 targets." in tables
    rows = {
        cells[1]: cells
        for line in tables.split("\n")
        if len(cells := [cell.strip(" |") for cell in line.split(" | ")]) > 1
    }
    assert rows["condition subject"][2:6] == ["≥ 0.80", "0.12 (0.09–0.15)", "0.90 (0.87–0.92)", "0.80 (0.76–0.83)"]
    assert rows["condition subject"][6] == "no" and rows["condition subject"][7].endswith(", worse")
    assert rows["leak: condition style"][6] == "yes"  # 0.14 is at most 0.04 + 0.10
    assert rows["leak: condition style"][7].endswith(", better")
    assert rows["prompt scene"][6] == "yes"


def test_leaks_of_nothing_and_what_is_the_same_everywhere_are_left_out() -> None:
    made = {"row": "joint", "wording": "bank", "weight": 0.8}
    rates = {"condition style": [400, 500], "prompt subject": [500, 500]}
    rates |= {"condition subject": [2, 500], "condition scene": [2, 500], "condition layout": [3, 500]}
    known = rates | {"condition style": [450, 500], "condition layout": [0, 500]}
    shown = {"wording": "bank", "weight": {task.value: 0.8 for task in TASKS}}
    found = [made | {"trial": "style", "rates": rates}, made | {"trial": "style, known", "rates": known}]
    results = report.Results({}, shown, found)
    told = [line.split(" | ")[1] for line in report.tasks(results).splitlines() if "leak" in line]
    assert told == ["leak: condition subject", "leak: condition layout"]  # 0.00 with a target; 0.006 is 0.01
    lines = report.combinations(results).splitlines()[4:]
    assert [line.split(" | ")[1] for line in lines] == ["condition style", "condition layout"]
