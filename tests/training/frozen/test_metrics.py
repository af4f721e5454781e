"""The scores of the paper, worked by hand on small vectors; their intervals, and the table that holds them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.encoders import OpenClip
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.evaluate.scores import COLUMNS, PAPER, Rows, Score, as_json, markdown_table
from training.frozen.metrics import (
    TASK_METRICS,
    Embedder,
    clip_i,
    clip_p,
    clip_s,
    clip_t,
    mean_interval,
    task_scores,
)


def rows(*values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(found: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


# Worked by hand.


def test_clip_i() -> None:
    # (3, 4) . (4, 3) = 24 over 5 x 5; (1, 0) . (-2, 0) = -2 over 1 x 2; (1, 2, 2) needs no normalising to be square.
    close(clip_i(rows((3, 4), (1, 0), (0, 2)), rows((4, 3), (-2, 0), (7, 0))), 0.96, -1.0, 0.0)


@pytest.mark.parametrize("score", [clip_t, clip_p])
def test_clip_score(score) -> None:
    # 2.5 x 24/25; 2.5 x 1 for the same direction; a cosine of -0.6 counts as none.
    close(score(rows((3, 4), (2, 0), (3, 4)), rows((4, 3), (9, 0), (-1, 0))), 2.4, 2.5, 0.0)


def test_clip_s() -> None:
    generated, prompt = rows((3, 4), (1, 0)), rows((1, 0), (0, 1))
    condition, condition_prompt = rows((0, 2), (0, 1)), rows((5, 0), (1, 0))
    # First row: (0.6, 0.8) - (1, 0) = (-0.4, 0.8); (0, 1) - (1, 0) = (-1, 1);
    # (0.4 + 0.8) / (sqrt(0.16 + 0.64) sqrt(2)) = 1.2 / sqrt(1.6). Second row: (1, -1) against (-1, 1).
    close(clip_s(generated, prompt, condition, condition_prompt), 1.2 / math.sqrt(1.6), -1.0)


def test_clip_s_of_an_image_that_is_its_text_is_zero() -> None:
    close(clip_s(rows((1, 2)), rows((2, 4)), rows((0, 1)), rows((1, 0))), 0.0)


# Properties.


@pytest.fixture(scope="module")
def embeddings() -> list[torch.Tensor]:
    return list(torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0)))


def test_no_score_depends_on_an_embeddings_length(embeddings: list[torch.Tensor]) -> None:
    lengths = [0.01, 3.0, 50.0, 1000.0]
    scaled = [embedding * length for embedding, length in zip(embeddings, lengths, strict=True)]
    for task in TASK_METRICS:
        for metric, values in task_scores(task, *embeddings).items():
            torch.testing.assert_close(task_scores(task, *scaled)[metric], values, atol=1e-5, rtol=0)


def test_an_image_scores_best_against_itself(embeddings: list[torch.Tensor]) -> None:
    generated, other, *texts = embeddings
    close(clip_i(generated, generated), *[1.0] * 16)
    close(clip_s(generated, texts[0], generated, texts[0]), *[1.0] * 16)
    close(clip_i(generated, -generated), *[-1.0] * 16)
    assert (clip_i(generated, other) < 0.9).all()


def test_half_precision_is_computed_in_full(embeddings: list[torch.Tensor]) -> None:
    half = [embedding.half() for embedding in embeddings]
    assert clip_s(*half).dtype == torch.float32
    torch.testing.assert_close(clip_s(*half), clip_s(*(embedding.float() for embedding in half)))


def test_each_task_has_its_two_scores_of_table_1() -> None:
    one, two = rows((3, 4)), rows((4, 3))
    x, y = rows((1, 0)), rows((0, 1))
    found = {task: task_scores(task, one, two, x, y) for task in TASK_METRICS}
    assert {task.value: tuple(scores) for task, scores in found.items()} == {
        "everything": ("CLIP-I", "CLIP-T"),
        "style": ("CLIP-S", "CLIP-P"),
        "object": ("CLIP-I", "CLIP-P"),
        "composition": ("CLIP-I", "CLIP-P"),
        "face": ("CLIP-I", "CLIP-P"),
    }
    close(found[Task.EVERYTHING]["CLIP-I"], 0.96)
    close(found[Task.EVERYTHING]["CLIP-T"], 2.0)  # against the condition's caption y: 2.5 x 0.8
    close(found[Task.FACE]["CLIP-P"], 1.5)  # against the prompt x: 2.5 x 0.6
    close(found[Task.STYLE]["CLIP-S"], (-0.32 - 0.32) / 0.8)  # (-0.4, 0.8) against (0.8, -0.4)


def test_scores_of_captions_leave_out_what_has_none() -> None:
    embeddings = [rows((1, 2), (2, 1), (0, 1)), rows((3, 1), (1, 1), (1, 0)), rows(*[(1, 0)] * 3), rows(*[(0, 1)] * 3)]
    whole = task_scores(Task.STYLE, *embeddings)
    part = task_scores(Task.STYLE, *embeddings, captioned=[True, False, True])
    assert part["CLIP-S"].tolist() == whole["CLIP-S"][[0, 2]].tolist()
    assert part["CLIP-P"].tolist() == whole["CLIP-P"].tolist()
    assert task_scores(Task.STYLE, *embeddings, captioned=[False] * 3).keys() == {"CLIP-P"}
    assert task_scores(Task.FACE, *embeddings, captioned=[False] * 3).keys() == {"CLIP-I", "CLIP-P"}


def test_a_task_without_scores() -> None:
    with pytest.raises(ValueError, match='no scores for the task "pose"; it does for everything, style'):
        task_scores(Task.POSE, *[rows((1, 0))] * 4)


# Intervals.


def each(values) -> list[str]:
    """Every value in a group of its own."""
    return [str(n) for n in range(len(values))]


@pytest.mark.parametrize("level, deviations", [(0.95, 1.959964), (0.8, 1.281552)])
def test_the_interval_is_the_normal_theorys_where_that_holds(level: float, deviations: float) -> None:
    values = np.random.default_rng(3).normal(0.7, 0.05, 400)
    low, high = mean_interval(values, each(values), level=level)
    half = deviations * values.std() / math.sqrt(400)
    assert abs(low - (values.mean() - half)) < 0.06 * half
    assert abs(high - (values.mean() + half)) < 0.06 * half


@pytest.mark.parametrize("pictures", [1, 20])
def test_nineteen_intervals_of_twenty_hold_the_truth(pictures: int) -> None:
    """Also where the many pictures of a group are nearly alike; taken for independent, one of three did."""
    generator, held, naive = np.random.default_rng(5), 0, 0
    for _ in range(200):
        values = np.repeat(generator.exponential(1.0, 40), pictures) + generator.normal(0, 1e-3, 40 * pictures)
        low, high = mean_interval(values, np.repeat(each(range(40)), pictures).tolist(), resamples=1000)
        held += low <= 1.0 <= high
        low, high = mean_interval(values, each(values), resamples=100)
        naive += low <= 1.0 <= high
    assert 0.88 <= held / 200 <= 0.98  # skewed and few: a little below 0.95 is what a bootstrap reaches
    assert pictures == 1 or naive / 200 < 0.5


def test_groups_of_different_sizes() -> None:
    """Two groups, drawn twice: the means are those of one twice, of both, of the other twice, as 1 : 2 : 1."""
    values, groups = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    assert mean_interval(values, groups, level=0.4) == (0.25, 0.25)  # of both, all four values
    assert mean_interval(values, groups, level=0.6) == (0.0, 1.0)
    assert mean_interval(values, groups, seed=1) == mean_interval(values, groups, seed=1)


def test_one_group_and_equal_values() -> None:
    assert all(math.isnan(bound) for bound in mean_interval([0.5, 0.7], ["a", "a"]))
    assert mean_interval([0.5, 0.5, 0.5], ["a", "b", "c"]) == (0.5, 0.5)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf, 0.0]])
def test_values_of_which_nothing_can_be_said(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value, and finite ones"):
        mean_interval(values, each(values))


# The embedder.


SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}


@pytest.fixture(scope="module")
def model() -> OpenClip:
    torch.manual_seed(0)
    return OpenClip(SMALL).requires_grad_(False).eval()


def test_the_embedder_gives_open_clips_projected_embeddings(model: OpenClip) -> None:
    generator = np.random.default_rng(0)
    sizes = [(28, 28), (40, 30), (31, 64), (28, 28), (100, 50)]
    images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    texts = ["a cat", "a dog on a mat", "the same words again and again " * 9]
    embedder = Embedder(model, batch_size=2)
    found = embedder.images(images)
    assert found.shape == (5, 24) and found.dtype == torch.float32
    pixels = torch.from_numpy(np.array(images[3])).permute(2, 0, 1).float().div(255)
    mean, std = torch.tensor(model.mean).view(3, 1, 1), torch.tensor(model.std).view(3, 1, 1)
    torch.testing.assert_close(found[3:4], model.clip.encode_image(((pixels - mean) / std)[None]), atol=1e-5, rtol=1e-4)
    words = embedder.texts(texts)
    assert words.shape == (3, 24)
    torch.testing.assert_close(words[1:2], model.clip.encode_text(model.tokenizer(texts[1:2])), atol=1e-5, rtol=1e-4)


def test_pictures_are_taken_a_batch_at_a_time(model: OpenClip, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    seen: list[int] = []
    encode = model.clip.encode_image
    monkeypatch.setattr(model.clip, "encode_image", lambda pixels: seen.append(len(taken)) or encode(pixels))
    pictures = (taken.append(n) or Image.new("RGB", (30, 30), (50 * n, 0, 0)) for n in range(5))
    assert len(Embedder(model, batch_size=2).images(pictures)) == 5
    assert seen == [2, 4, 5]


def test_a_grey_picture_and_one_with_alpha_are_embedded_as_rgb(model: OpenClip) -> None:
    grey = Image.new("L", (30, 30), 90)
    found = Embedder(model).images([grey, grey.convert("RGB"), grey.convert("RGBA")])
    torch.testing.assert_close(found, found[:1].expand(3, -1))


def test_nothing_to_embed(model: OpenClip) -> None:
    with pytest.raises(ValueError, match="nothing to embed"):
        Embedder(model).texts([])


# The table.


def small_rows() -> Rows:
    return {
        "Joint | 512": {
            Task.EVERYTHING: {
                "CLIP-I": Score("CLIP-I", 0.9, 0.88, 0.91, 3, 3),
                "CLIP-T": Score("CLIP-T", 0.8, 0.7, 0.9, 3, 3),
            },
            Task.STYLE: {
                "CLIP-S": Score("CLIP-S", 0.44, 0.4, 0.48, 3, 2),
                "CLIP-P": Score("CLIP-P", 0.75, 0.7, 0.8, 3, 2),
            },
        },
        "Face alone": {
            Task.FACE: {
                "CLIP-I": Score("CLIP-I", 0.5, math.nan, math.nan, 1, 1),
                "CLIP-P": Score("CLIP-P", 0.6, 0.6, 0.6, 3, 3),
            }
        },
    }


TABLE = """\
|  | Replication<br>CLIP-I | Replication<br>CLIP-T | Style<br>CLIP-S × 2.5 | Style<br>CLIP-P | Object<br>CLIP-I \
| Object<br>CLIP-P | Composition<br>CLIP-I | Composition<br>CLIP-P | Faces<br>CLIP-I | Faces<br>CLIP-P |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| Joint \\| 512 | 0.9000<br>[0.8800, 0.9100] | 0.8000<br>[0.7000, 0.9000] | 1.1000<br>[1.0000, 1.2000] \
| 0.7500<br>[0.7000, 0.8000] | – | – | – | – | – | – |
| Face alone | – | – | – | – | – | – | – | – | 0.5000 | 0.6000<br>[0.6000, 0.6000] |
| *Single-task models (paper)* | *0.9152* | *0.8523* | *1.0988* | *0.7615* | *0.7670* | *0.6351* | *0.7337* \
| *0.6424* | *0.5154* | *0.6012* |
| *IPAdapter-Instruct (paper)* | *0.9098* | *0.8542* | *1.1171* | *0.7776* | *0.8040* | *0.6402* | *0.7082* \
| *0.6517* | *0.5264* | *0.5976* |
| *Fixed instruct prompts (paper)* | *0.9086* | *0.8528* | *1.1141* | *0.7810* | *0.8029* | *0.6408* | *0.7151* \
| *0.6517* | *0.5159* | *0.6009* |
"""


def test_the_table_is_table_1_with_our_rows_above() -> None:
    table, _, notes = markdown_table(small_rows()).partition("\n\n")
    assert table + "\n" == TABLE
    notes = " ".join(notes.split())
    assert "over 1 to 3 pictures a task, and 95 % bootstrap interval over the 1 to 3 people or photographs" in notes
    assert "measured with other data and full-size models" in notes
    assert "times 2.5, which is our guess" in notes


def test_every_column_has_a_figure_of_the_paper() -> None:
    assert len(COLUMNS) == 10 and all(len(values) == 10 for values in PAPER.values())


def test_scores_are_means_with_their_interval() -> None:
    score = Score.of("CLIP-I", torch.tensor([0.2, 0.4, 0.9]), ["a", "b", "c"])
    assert score.mean == pytest.approx(0.5) and score.count == 3 and 0.2 <= score.low < 0.5 < score.high <= 0.9
    assert Score.of("CLIP-P", torch.tensor([0.5] * 3), ["a", "b", "a"]) == Score("CLIP-P", 0.5, 0.5, 0.5, 3, 2)


def test_scores_are_kept_by_scorer_row_task_and_metric() -> None:
    content = json.loads(json.dumps(as_json({"a judge": small_rows()}), allow_nan=False))["a judge"]
    style = {"mean": 0.44, "low": 0.4, "high": 0.48, "count": 3, "groups": 2}
    assert content["Joint | 512"]["style"]["CLIP-S"] == style
    assert content["Face alone"]["face"]["CLIP-I"]["low"] is None


def test_no_scores_at_all() -> None:
    with pytest.raises(ValueError, match="no scores to put into a table"):
        markdown_table({"Joint": {}})
