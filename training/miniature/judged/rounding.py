"""What keeping the weights in eight bits costs: two results of `evaluate`, figure by figure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from training.miniature.judged.cases import Rate
from training.miniature.judged.report import RESULTS
from tyro.conf import Positional


@dataclass
class RoundingConfig:
    """Attributes:
    before: the folder in which `evaluate` counted with the weights of before.
    after: and with those of now.
    """

    before: Positional[Path]
    after: Positional[Path]


def shared(before: Path, after: Path) -> dict[tuple[str, str, str], tuple[Rate, Rate]]:
    """By trial, row and figure, what both folders have counted: before, after.

    Raises:
        FileNotFoundError: there are no results in a folder.
        ValueError: they were not made in the same way.
    """
    one, other = (_results(folder) for folder in (before, after))
    if one["settings"] != other["settings"]:
        raise ValueError(f"{before} and {after} were made with different settings; run `evaluate` alike for both.")
    return {
        (made["trial"], made["row"], figure): (Rate(*rate), Rate(*other["found"][job]["rates"][figure]))
        for job, made in one["found"].items()
        if job in other["found"]
        for figure, rate in made["rates"].items()
    }


def _results(folder: Path) -> dict:
    path = folder / RESULTS
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}; run `evaluate --out {folder}` first.")
    return json.loads(path.read_text(encoding="utf-8"))


def run(config: RoundingConfig) -> None:
    figures = shared(config.before, config.after)
    print("| trial | row | figure | before | after | difference |\n| --- | --- | --- | ---: | ---: | ---: |")
    for names, (one, other) in figures.items():
        change = other.share - one.share
        print(f"| {' | '.join(names)} | {one.share:.3f} | {other.share:.3f} | {change:+.3f} |")
    changes = [other.share - one.share for one, other in figures.values()]
    mean = sum(changes) / len(changes)
    print(f"\n{len(changes)} figures: from {min(changes):+.3f} to {max(changes):+.3f}, mean {mean:+.4f}")
