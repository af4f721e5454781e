"""The small world: the same picture from the same factors, tasks that share what they should, and a clean split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.tasks import Task
from training.datasets.index import Shards
from training.datasets.sample import Sample, decode_picture
from training.datasets.shards import Tally
from training.miniature.models.fit import Fit, fit
from training.miniature.world import captions, drawn, factors, samples, words
from training.miniature.world.factors import IDENTITIES, LAYOUTS, SCENES, STYLES, SUBJECTS, Factors
from training.miniature.world.style import render, render_cut_out

CAT = Factors("cat", "poster", "large", "meadow", "red", jitter=3)


def test_a_picture_follows_from_its_factors_alone() -> None:
    assert render(CAT).shape == (64, 64, 3)
    assert np.array_equal(render(CAT), render(replace(CAT)))
    for changed in (
        {"subject": "fish"}, {"style": "neon"}, {"layout": "pair"}, {"scene": "sea"}, {"colour": "teal"}, {"jitter": 4}
    ):  # fmt: skip
        assert np.abs(render(CAT).astype(int) - render(replace(CAT, **changed))).mean() > 1, changed


def test_styles_are_told_by_their_colours() -> None:
    """Line styles know no hue; neon is dark and watercolour pale, whatever they show."""
    generator = np.random.default_rng(0)

    def pictures(style: str) -> np.ndarray:
        return np.stack([render(factors.sample(generator, None, style=style)) for _ in range(40)]).astype(float)

    pencil = pictures("pencil")
    assert (pencil.max(axis=3) - pencil.min(axis=3)).max() < 20
    brightness = {style: pictures(style).mean(axis=(1, 2, 3)) for style in ("neon", "watercolour")}
    assert brightness["neon"].max() < 160 < brightness["watercolour"].min()


def test_a_cut_out_stands_on_its_square_alone() -> None:
    picture = render_cut_out(CAT, (12, 200, 90))
    assert (picture[:3] == (12, 200, 90)).all()
    red = (picture[..., 0] > 200) & (picture[..., 1] < 100)
    assert 0.1 < red.mean() < 0.6


def test_training_never_sees_what_is_held_out() -> None:
    generator = np.random.default_rng(1)
    seen = [factors.sample(generator, False, person=n % 3 == 0) for n in range(3000)]
    kept = [factors.sample(generator, True, person=n % 3 == 0) for n in range(1500)]
    for group in (seen, kept):  # each value of each factor is on both sides: only combinations differ
        assert {one.style for one in group} == set(STYLES)
        assert {one.subject for one in group} == {*SUBJECTS, "person"}
        assert {one.layout for one in group} == {*LAYOUTS, "portrait"}
        assert {one.scene for one in group} == set(SCENES)
    assert {one.identity for one in seen} == {-1, *range(len(IDENTITIES))}
    assert len({one.identity for one in kept}) > 12
    things = [one for one in seen if one.subject != "person"]
    for pair, possible in (
        (("subject", "style"), 64), (("subject", "layout"), 48), (("style", "layout"), 48), (("subject", "scene"), 48)
    ):  # fmt: skip
        found = {tuple(getattr(one, name) for name in pair) for one in things}
        assert 0.85 * possible < len(found) < 0.97 * possible, pair
        assert any(tuple(getattr(one, name) for name in pair) not in found for one in kept), pair


@pytest.mark.parametrize("held_out", [False, True])
def test_each_task_shares_its_factor_and_no_other(held_out: bool) -> None:
    generator = np.random.default_rng(2)
    for _ in range(60):
        style, thing, layout, face = (
            samples.pair(task, generator, held_out) for task in (Task.STYLE, Task.OBJECT, Task.COMPOSITION, Task.FACE)
        )
        assert style.condition.style == style.target.style
        assert style.condition.subject != style.target.subject
        assert style.condition.scene != style.target.scene
        assert (thing.condition.subject, thing.condition.colour) == (thing.target.subject, thing.target.colour)
        assert thing.condition.style != thing.target.style and thing.condition.scene != thing.target.scene
        assert layout.condition.layout == layout.target.layout
        assert layout.condition.style != layout.target.style and layout.condition.subject != layout.target.subject
        assert face.condition.identity == face.target.identity >= 0
        assert face.condition.expression != face.target.expression and face.condition.style != face.target.style
        for pair in (style, thing, layout, face):
            assert pair.target.held_out == held_out and not (pair.condition.held_out and not held_out)
            assert not np.array_equal(pair.condition_picture, pair.target_picture)


def test_the_prompt_leaves_to_the_condition_what_it_gives() -> None:
    generator = np.random.default_rng(3)
    style_words = [phrase for phrases in captions.STYLE_WORDS.values() for phrase in phrases]
    names = [*SUBJECTS, *(captions.many(subject) for subject in SUBJECTS)]
    for _ in range(60):
        pair = samples.pair(Task.STYLE, generator)
        assert not any(phrase in pair.prompt for phrase in style_words)
        prompt = samples.pair(Task.OBJECT, generator).prompt.replace(",", "").split()
        assert not set(prompt) & set(names)
        prompt = samples.pair(Task.COMPOSITION, generator).prompt
        assert not any(word in prompt for word in ("middle", "left", "right", "side", "nearby", "distance"))
        pair = samples.pair(Task.FACE, generator)
        assert not any(word in pair.prompt for word in ("skin", "hair", "bald", "beard", "glasses", "bob", "pigtails"))


def test_prompts_of_training_leave_out_other_parts_too_and_those_of_tests_do_not() -> None:
    generator, count = np.random.default_rng(3), 300
    for held_out, least, most in ((False, 0.73, 0.87), (True, 1, 1)):
        said = {"subject": 0, "scene": 0, "expression": 0}
        for _ in range(count):
            style, face = (samples.pair(task, generator, held_out) for task in (Task.STYLE, Task.FACE))
            said["subject"] += style.target.subject in style.prompt
            said["scene"] += any(words in face.prompt for words in captions.SCENE_WORDS[face.target.scene])
            said["expression"] += any(word in face.prompt for word in captions.EXPRESSION_WORDS[face.target.expression])
        assert all(least <= number / count <= most for number in said.values()), said


def test_shards_of_the_world_read_as_any_dataset_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        samples.run(samples.BuildConfig(tmp_path / name, count=20, validation=5, shard_size=12))
    files = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert files == ["train-0000000.tar", "train-0000012.tar", "validation-0000000.tar"]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    shards = Shards([tmp_path / "one" / file for file in files], Tally(0))
    read = [Sample.from_members(shards[n]) for n in range(len(shards))]
    assert [sample.task for sample in read] == [*samples.TASKS] * 5
    assert all((sample.target is None) == (sample.task is Task.EVERYTHING) for sample in read)
    assert decode_picture(read[1].condition).size == (64, 64)
    assert read[2].subject in SUBJECTS and read[1].subject == ""


def test_captions_are_made_of_known_words_alone() -> None:
    generator = np.random.default_rng(4)
    known = torch.tensor(words.vocabulary())
    people = [factors.sample(generator, None, person=n % 2 == 0) for n in range(400)]
    texts = [captions.caption(one, generator, captions.random_omissions(generator)) for one in people]
    assert torch.isin(words.tokenize([*texts, ""]), known).all()
    assert max(len(words.encode(text)) for text in texts) < 60
    assert len(set(texts)) > 390


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def train(folder: Path, stop: int | None = None, steps: int = 30) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def draw(step: int) -> dict[str, torch.Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            return {"inputs": torch.randn(8, 3, generator=torch.Generator().manual_seed(step))}

        def loss_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            inputs = batch["inputs"]
            return (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean(), {}

        return fit(model, draw, loss_of, Fit(steps, rate=0.05, warmup=3, save_every=10), folder).weight.detach()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=17)
    assert torch.equal(train(tmp_path / "cut"), whole)
    assert (whole - 1).abs().max() < 0.9
    with pytest.raises(ValueError, match="holds a run of 30 steps, more than 20; remove it"):
        train(tmp_path / "whole", steps=20)


def test_pictures_of_earlier_drawings_are_not_taken_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = drawn.pictures(4, 0, tmp_path)
    assert drawn.pictures(4, 0, tmp_path).sha256 == one.sha256 and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(drawn, "_drawing", lambda: "later")
    assert drawn.pictures(4, 0, tmp_path).name == "training-0-4-later" and len(list(tmp_path.iterdir())) == 4
