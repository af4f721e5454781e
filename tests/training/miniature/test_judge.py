"""The oracle's view of a folder of pictures, and the scores of true targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from ipadapter_instruct_core.tasks import Task
from PIL import Image
from training.evaluate.index import Picture, write_index_line
from training.miniature.judged import judge
from training.miniature.models import clip
from training.miniature.world import samples
from training.miniature.world.factors import Factors
from training.miniature.world.style import render

CAT, FISH = Factors("cat", "poster", "large", "sea", "red"), Factors("fish", "poster", "large", "sea", "red")


def test_pictures_agree_where_they_show_what_their_conditions_show(tmp_path: Path) -> None:
    for index, made in enumerate((CAT, CAT, FISH, CAT, FISH)):  # the last rewords the first, and is not counted
        condition = f"conditions/object/{index % 4:05d}.jpg"
        picture = Picture("a row", Task.OBJECT, index, condition, "", "")
        write_index_line(tmp_path, picture)
        for name, shown in ((condition, CAT), (picture.name, made)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(shown)).save(tmp_path / name, quality=95)
    (line,) = [line for line in judge.of_oracle([tmp_path]).splitlines() if "a row" in line]
    assert [cell.strip()[:4] for cell in line.split("|")[1:-1]] == ["a ro", "", "", "0.75", "", ""]


def test_true_targets_score_as_copies_where_everything_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples.run(samples.BuildConfig(tmp_path / "data", count=5, validation=10))
    monkeypatch.setattr(judge, "load_open_clip", lambda path: clip.load())
    config = judge.EvaluateConfig.model_construct(
        data=[tmp_path / "data"], samples=2, seed=0, instructions="bank", max_skipped=0.0, scorer=[Path("clip")]
    )
    found = judge.of_targets(config)["Targets"]
    assert set(found) == set(judge.FACTORS)
    assert found[Task.EVERYTHING]["CLIP-I"].mean == pytest.approx(1, abs=1e-5)
    assert found[Task.OBJECT]["CLIP-I"].mean < 0.9
