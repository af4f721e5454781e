"""The figures show what they were given: every line, point and picture in its colour and at its place."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.encoders import OpenClip
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from training.evaluate import figures
from training.evaluate.figures import FiguresConfig, plot_instructions, plot_learning_curves, project, read_runs, run

TASKS = [Task.EVERYTHING, Task.STYLE, Task.OBJECT, Task.COMPOSITION, Task.FACE]
BLUE, VERMILION, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)  # Okabe and Ito 2008


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def of_colour(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 6) -> np.ndarray:
    """[H, W] of bool."""
    return (abs(image - np.array(colour)) <= tolerance).all(axis=-1)


def refusal(config: FiguresConfig) -> str:
    with pytest.raises(ValueError) as caught:
        run(config)
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 330 and message.endswith("."), message
    return message


# Learning curves.


def log(folder: Path, lines: list[dict], name: str = "validation.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_read_by_task_metric_and_label(tmp_path: Path) -> None:
    style = [{"step": step, "style": {"CLIP-S": 0.4 + step / 1000, "CLIP-P": 0.7}} for step in (200, 0, 100)]
    both = [{**line, "face": {"CLIP-I": 0.5, "CLIP-P": 0.6}} for line in style]
    # Step 100 was trained again after an interruption; the last line counts, and steps are in order.
    both.append({"step": 100, "style": {"CLIP-S": 0.1, "CLIP-P": 0.2}, "face": {"CLIP-I": 0.3, "CLIP-P": 0.4}})
    runs = {"Joint": log(tmp_path / "joint", both), "Style": log(tmp_path / "style", style)}
    curves = read_runs(runs, (Task.STYLE, Task.FACE))
    assert list(curves) == [Task.STYLE, Task.FACE] and list(curves[Task.STYLE]) == ["CLIP-S", "CLIP-P"]
    steps, values = curves[Task.STYLE]["CLIP-S"]["Joint"]
    assert steps == (0, 100, 200) and values == pytest.approx((1.0, 0.25, 1.5))  # the cosine times 2.5
    assert curves[Task.STYLE]["CLIP-P"]["Style"] == ((0, 100, 200), (0.7, 0.7, 0.7))
    assert list(curves[Task.FACE]["CLIP-I"]) == ["Joint"]
    assert curves[Task.FACE]["CLIP-P"]["Joint"] == ((0, 100, 200), (0.6, 0.4, 0.6))


def test_the_training_loss_is_a_third_metric(tmp_path: Path) -> None:
    folder = log(tmp_path, [{"step": 0, "face": {"CLIP-I": 0.5, "CLIP-P": 0.6}}])
    log(tmp_path, [{"step": 0, "loss": 9.0, "loss/face": 0.2}, {"step": 1, "loss": 9.0}], "metrics.jsonl")
    curves = read_runs({"Joint": folder}, (Task.FACE,), loss=True)
    assert curves[Task.FACE]["Training loss"] == {"Joint": ((0,), (0.2,))}


def test_smoothing_is_a_moving_average() -> None:
    values = [0.0] * 50 + [1.0] * 50  # 5 % of 100 steps: five at once
    smooth = figures._smoothed(values)
    assert smooth[:48] == pytest.approx([0.0] * 48, abs=1e-12) and smooth[52:] == pytest.approx([1.0] * 48)
    assert smooth[48:52] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert figures._smoothed([0.3]) == pytest.approx([0.3])


def panels(image: np.ndarray) -> int:
    """How many panels: dark grey axis lines that run on for more than 150 pixels, one below each panel."""
    dark = of_colour(image, (86, 92, 104), 40)  # lighter where a line is not whole pixels wide
    found = 0
    for row, above in zip(dark[1:], dark[:-1], strict=True):
        runs = np.diff(np.flatnonzero(np.diff(np.pad(row & ~above, 1).astype(int))))[::2]
        found += int((runs > 150).sum())
    return found


def test_learning_curves_have_a_panel_a_metric_and_a_colour_a_run(tmp_path: Path) -> None:
    steps = tuple(range(0, 1000, 100))
    rising, falling = tuple(step / 1000 for step in steps), tuple(1 - step / 1000 for step in steps)
    curves = {
        Task.STYLE: {"CLIP-S": {"Joint": (steps, rising), "Style": (steps, falling)}, "CLIP-P": {}},
        Task.FACE: {"CLIP-I": {"Joint": (steps, rising)}, "CLIP-P": {"Face": (steps, falling)}},
    }
    path = tmp_path / "curves.png"
    plot_learning_curves(curves, path)
    image = pixels(path)
    assert image.shape == (round(5.6 * 160), round(8.4 * 160), 3) and panels(image) == 4
    middle_y, middle_x = image.shape[0] * 11 // 20, image.shape[1] // 2
    blue, vermilion, green = (of_colour(image, colour) for colour in (BLUE, VERMILION, GREEN))
    legend = image.shape[0] // 18
    for mask, quarters in ((blue, "1100"), (vermilion, "1000"), (green, "0001")):
        body = mask.copy()
        body[:legend] = False
        halves = (body[:middle_y], body[middle_y:])
        drawn = [half[:, side].sum() > 100 for half in halves for side in (slice(0, middle_x), slice(middle_x, None))]
        assert drawn == [quarter == "1" for quarter in quarters]
        assert mask[:legend].sum() > 20  # named in the legend
    # The first panel: blue rises from left to right, vermilion falls.
    for mask, sign in ((blue, -1), (vermilion, 1)):
        y, x = np.nonzero(mask[legend:middle_y, :middle_x])
        assert np.corrcoef(x, y)[0, 1] * sign > 0.9


def test_shares_are_drawn_from_0_to_1(tmp_path: Path) -> None:
    curves = {Task.STYLE: {"share": {"Joint": (tuple(range(0, 1000, 100)), tuple(0.9 + n / 200 for n in range(10)))}}}
    rows = {}
    for shares in (True, False):
        path = tmp_path / f"{shares}.png"
        plot_learning_curves(curves, path, shares=shares)
        body = of_colour(pixels(path), BLUE)
        body[: len(body) // 5] = False  # the legend
        rows[shares] = np.ptp(np.flatnonzero(body.any(axis=1))) / len(body)
    assert 0.02 < rows[True] < 0.2 < 0.4 < rows[False], rows


def test_the_verb_draws_curves_from_logs(tmp_path: Path) -> None:
    lines = [{"step": step, "style": {"CLIP-S": 0.4, "CLIP-P": 0.7}} for step in range(0, 100, 10)]
    folder = log(tmp_path / "run", lines)
    with open(folder / "validation.jsonl", "a") as file:
        file.write('{"step": 100, "sty')  # killed while it wrote
    config = FiguresConfig(output=tmp_path / "a" / "b", runs={"Joint": folder}, curves=(Task.STYLE,), format="jpg")
    run(config)
    path = tmp_path / "a" / "b" / "learning-curves.jpg"
    with Image.open(path) as image:
        assert image.format == "JPEG"
    assert panels(pixels(path)) == 2 and of_colour(pixels(path), BLUE, 25).sum() > 100


def test_a_damaged_line_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = log(tmp_path, [{"step": 0, "face": {"CLIP-I": 0.5, "CLIP-P": 0.6}}])
    (folder / "validation.jsonl").write_text('{"step": 0\n' + (folder / "validation.jsonl").read_text() + "[1]\n")
    with caplog.at_level(logging.WARNING):
        curves = read_runs({"Joint": folder}, (Task.FACE,))
    assert curves[Task.FACE]["CLIP-I"]["Joint"] == ((0,), (0.5,))
    assert [
        f"line {number} is damaged" in record.message for number, record in zip((1, 3), caplog.records, strict=True)
    ]


def test_bad_runs(tmp_path: Path) -> None:
    def config(**settings: object) -> FiguresConfig:
        return FiguresConfig(output=tmp_path, **settings)

    assert "nothing to draw from; give --runs" in refusal(config())
    assert "validation.jsonl; make it with `python -m training train`" in refusal(config(runs={"a": tmp_path / "no"}))
    face = log(tmp_path / "face", [{"step": 0, "face": {"CLIP-I": 0.5, "CLIP-P": 0.6}}])
    assert 'No run has validation scores of the task "style"' in refusal(config(runs={"a": face}))
    assert "metrics.jsonl; make it with" in refusal(config(runs={"a": face}, curves=(Task.FACE,), loss=True))
    assert "--curves takes one or more of everything, style" in refusal(
        config(runs={"a": face}, curves=(Task.FACE, Task.POSE))
    )
    odd = log(tmp_path / "odd", [{"face": {"CLIP-I": 0.5}}])
    assert "names no step" in refusal(config(runs={"a": odd}, curves=(Task.FACE,)))
    with pytest.raises(ValidationError, match="colour_map"):
        config(colour_map="jet")


# The map of the instructions.


def clusters(size: int) -> tuple[dict[Task, torch.Tensor], dict[Task, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    centres = {task: torch.randn(1, 32, generator=generator) for task in TASKS}
    return {t: c + 0.3 * torch.randn(size, 32, generator=generator) for t, c in centres.items()}, centres


def test_tsne_keeps_clusters_apart_and_each_cross_in_its_own() -> None:
    embeddings, fixed = clusters(20)
    points, crosses = project(embeddings, fixed)
    assert all(points[task].shape == (20, 2) and crosses[task].shape == (1, 2) for task in TASKS)
    middles = np.stack([points[task].mean(axis=0) for task in TASKS])
    spread = max(np.linalg.norm(points[task] - points[task].mean(axis=0), axis=1).max() for task in TASKS)
    gaps = np.linalg.norm(middles[:, None] - middles[None], axis=-1)[~np.eye(5, dtype=bool)]
    assert gaps.min() > 2 * spread
    for number, task in enumerate(TASKS):
        assert np.linalg.norm(middles - crosses[task], axis=1).argmin() == number
    again, _ = project(embeddings, fixed)
    assert all((again[task] == points[task]).all() for task in TASKS)


def test_the_map_has_a_colour_a_task(tmp_path: Path) -> None:
    embeddings, fixed = clusters(12)
    path = tmp_path / "map.png"
    plot_instructions(embeddings, fixed, path)
    image = pixels(path)
    assert image.shape == (round(5.6 * 160), round(6.4 * 160), 3)
    for task in TASKS:
        number = list(Task).index(task)
        colour = tuple(int(figures.COLOURS[number][i : i + 2], 16) for i in (1, 3, 5))
        # The crosses are opaque: arms of 3.2 points, some 27 points long.
        assert of_colour(image[: int(0.88 * image.shape[0])], colour, 2).sum() > 100
    absent = tuple(int(figures.COLOURS[5][i : i + 2], 16) for i in (1, 3, 5))
    assert of_colour(image, absent, 2).sum() == 0


def test_too_few_instructions() -> None:
    with pytest.raises(ValueError, match="at least four instructions, and these are 3; add some"):
        project({Task.STYLE: torch.eye(3)}, {})


def test_the_verb_embeds_the_bank(tmp_path: Path) -> None:
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 1},
    }
    torch.manual_seed(0)
    save_file(OpenClip(settings).clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    bank = tmp_path / "bank"
    bank.mkdir()
    for task in TASKS:
        (bank / f"{task.value}.txt").write_text("".join(f"take the {task.value}, way {i}\n" for i in range(8)))
    run(FiguresConfig(output=tmp_path, open_clip=str(tmp_path), instructions=bank, per_task=5))
    assert of_colour(pixels(tmp_path / "instructions.png"), VERMILION, 2).sum() > 100
