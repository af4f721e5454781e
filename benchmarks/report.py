"""What a benchmark hands over: named values with their targets, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

STATES = {True: "met", False: "MISSED", None: ""}


@dataclass(frozen=True)
class Result:
    """One number. ``target`` is the most that it may be, or None where it is shown for comparison only."""

    name: str
    value: float
    unit: str
    target: float | None = None

    @property
    def ok(self) -> bool | None:
        return None if self.target is None else self.value <= self.target


class Lines:
    """Results that are printed as they come and written each time, so that a run that is cut off still says something.

    Args:
        path: a JSON file of ``{"results": [...], ...}``; what it holds is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, *results: Result, note: str = "") -> None:
        content = json.loads(self.path.read_text())
        for result in results:
            bound = "" if result.target is None else f"  <= {result.target:.3g}  {STATES[result.ok]}"
            print(f"  {result.name:<76} {result.value:>10.4g} {result.unit}{bound}", flush=True)
        if note:
            print(f"  {note}", flush=True)
            content["notes"].append(note.strip())
        content["results"] += as_json(list(results))
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print rows under a header: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join(cells).rstrip(), flush=True)


def results_table(title: str, results: list[Result]) -> None:
    """Print results as they are, each beside its target."""
    rows = []
    for result in results:
        target = "" if result.target is None else f"<= {result.target:g}"
        rows.append([result.name, f"{result.value:.4g} {result.unit}".strip(), target, STATES[result.ok]])
    table(title, ["", "value", "target", ""], rows)


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, help="write the results into this file: [{name, value, unit, target, ok}]")
    return made


def as_json(results: list[Result]) -> list[dict[str, object]]:
    return [asdict(result) | {"ok": result.ok} for result in results]


def write(results: list[Result], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(as_json(results), indent=1) + "\n")
