"""What `evaluate` counted, as tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ipadapter_instruct_core.tasks import Task
from training.files import write_atomically
from training.miniature.judged.cases import (
    CROSSED_TASKS,
    OF_PEOPLE,
    OF_THINGS,
    PROMPTS,
    TASK_TRIALS,
    TRIALS,
    WANTED,
    Rate,
    crossed_trial,
    difference,
)

RESULTS, TABLES = "results.json", "report.md"
NO_ADAPTER, PLAIN, JOINT, SINGLE, FIXED = "no adapter", "plain", "joint", "single", "fixed"  # names of rows
WORDINGS = ("fixed", "bank", "unseen")
FACTORS = ("subject", "style", "layout", "scene", "colour", "identity", "expression")
SOURCES = ("condition", "prompt")
CROSSED_FACTORS = {"things": OF_THINGS, "people": OF_PEOPLE}
CROSSING = (
    "The share of pictures that show the condition's value / the prompt's value; the two never agree. Bold: what the "
    "task takes from the condition. An open prompt leaves that out, a whole prompt says it too, and against the "
    "condition; without a prompt the instruction alone decides. With {count} pictures a 95 % interval reaches at most "
    "{reach:.2f} to either side; colours, which not every style shows, are counted in fewer."
)
Rates = Mapping[str, Rate]


class Aim(NamedTuple):
    """A figure of a trial. At most one of the three says what it should be; ``leak``: less is better.

    Attributes:
        above_chance: at most this much more than without an adapter.
    """

    figure: str
    least: float | None = None
    most: float | None = None
    above_chance: float | None = None
    leak: bool = False

    @property
    def target(self) -> str:
        if self.least is not None:
            return f"≥ {self.least:.2f}"
        if self.most is not None:
            return f"≤ {self.most:.2f}"
        return "" if self.above_chance is None else f"≤ chance + {self.above_chance:.2f}"

    def met(self, rate: Rate, chance: Rate | None) -> str:
        """ "yes" or "no"; "" where there is no target, or no chance to compare with."""
        bound = self.most
        if self.above_chance is not None and chance is not None:
            bound = chance.share + self.above_chance
        if self.least is not None:
            return "yes" if rate.share >= self.least else "no"
        return "" if bound is None else "yes" if rate.share <= bound else "no"


def own_wording(row: str, wording: str) -> str:
    """How a row, or one at a step (``ROW@STEP``), is told where it matters not; what was trained on one wording a task
    is told that."""
    return FIXED if row.partition("@")[0] == FIXED else wording


def leak(figure: str, most: float | None = None, above_chance: float | None = None) -> Aim:
    return Aim(figure, most=most, above_chance=above_chance, leak=True)


REPLICATION = (
    Aim("together", least=0.8),
    *(Aim(f"condition {factor}") for factor in FACTORS),
)
OBJECT = (
    Aim("condition subject", least=0.8),
    Aim("condition colour"),
    Aim("prompt scene", least=0.7),
    Aim("prompt style"),
    leak("condition style", above_chance=0.1),
    leak("background", above_chance=0.1),
    leak("condition layout"),
)
# By trial; the first figure is what is wanted from the condition.
AIMS: dict[str, tuple[Aim, ...]] = {
    "everything": REPLICATION,
    "everything without a prompt": REPLICATION,
    "style": (
        Aim("condition style", least=0.8),
        Aim("prompt subject", least=0.8),
        Aim("prompt scene"),
        leak("condition subject", most=0.1),
        leak("condition scene"),
        leak("condition layout"),
    ),
    "object": OBJECT,
    "object without its name": OBJECT,
    "composition": (
        Aim("condition layout", least=0.8),
        Aim("prompt subject", least=0.7),
        Aim("prompt style"),
        Aim("prompt scene"),
        leak("condition subject"),
        leak("condition style"),
        leak("condition scene"),
    ),
    "face": (
        Aim("condition identity", least=0.7),
        Aim("prompt expression", least=0.7),
        Aim("prompt scene", least=0.7),
        Aim("prompt style"),
        leak("condition expression"),
        leak("condition style"),
        leak("condition scene"),
    ),
}
NOTHING = 0.005  # leaks below this share of the pictures are left out of the tables
CHANCE_AT_MOST = {("face", "condition identity"): 0.15}  # else what is wanted could come without a condition


@dataclass
class ReportConfig:
    """Write the tables again, of what `evaluate` has counted so far."""

    folder: Path = Path("runs/miniature/evaluation")


@dataclass(frozen=True)
class Results:
    """What results.json holds."""

    settings: Mapping[str, Any]
    shown: Mapping[str, Any]
    found: Sequence[Mapping[str, Any]]

    def rates(self, trial: str, row: str, wording: str | None = None, weight: float | None = None) -> Rates:
        """A row's figures; by default at the wording and the weight that the last run showed. {} if not measured."""
        if row == NO_ADAPTER:
            told, strength = ("",), 0.0
        else:
            shown = own_wording(row, self.shown["wording"])
            told = (shown if wording is None else wording, "")
            strength = self.shown["weight"][self.task(trial)] if weight is None else weight
        for one in self.found:
            if (one["trial"], one["row"], one["weight"]) == (trial, row, strength) and one["wording"] in told:
                return {name: Rate(*counts) for name, counts in one["rates"].items()}
        return {}

    def rows(self, trial: str) -> list[str]:
        """Those measured as shown, the bare base first, then IPAdapter+."""
        rows = dict.fromkeys([NO_ADAPTER, PLAIN, JOINT, SINGLE, FIXED, *(one["row"] for one in self.found)])
        return [row for row in rows if self.rates(trial, row)]

    @staticmethod
    def task(trial: str) -> str:
        return TRIALS[trial].task.value

    def measured(self, row: str, name: str) -> list[Any]:
        """The values of ``wording`` or ``weight`` at which a row was measured."""
        return sorted({one[name] for one in self.found if one["row"] == row})


def read_results(folder: Path) -> Results:
    """Raises FileNotFoundError where there are none."""
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; make it with `python -m training.miniature evaluate`.")
    content = json.loads(path.read_text(encoding="utf-8"))
    return Results(content["settings"], content["shown"], list(content["found"].values()))


def write(folder: Path) -> Path:
    """Write ``report.md`` beside the results; raises what `read_results` raises."""
    results = read_results(folder)
    parts = [head(results, folder / "pictures.png")]
    parts += [part(results) for part in (tasks, equal_steps, wordings, weights, combinations, crossing)]
    write_atomically(folder / TABLES, ("\n\n".join(part for part in parts if part) + "\n").encode())
    return folder / TABLES


def run(config: ReportConfig) -> None:
    print(write(config.folder))


def text(rate: Rate | None) -> str:
    """The share and its 95 % interval."""
    if rate is None:
        return ""
    low, high = rate.interval
    return f"{rate.share:.2f} ({low:.2f}–{high:.2f})"


def tells(aim: Aim, found: Iterable[Rate | None], always: bool = False) -> bool:
    """Whether a figure was measured, and is more than a leak of nothing (or is to be shown always)."""
    return any(rate and (always or not aim.leak or rate.share >= NOTHING) for rate in found)


def change(one: Rate | None, other: Rate | None, leak: bool) -> str:
    """How much more ``one`` is, with its interval, and whether that is better."""
    if one is None or other is None:
        return ""
    found, low, high = difference(one, other)
    verdict = "" if low <= 0 <= high else ", worse" if (found > 0) == leak else ", better"
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f}){verdict}"


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(titles)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines))


def head(results: Results, picture: Path) -> str:
    """Title, settings, the adapters' hashes, the sheet."""
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    weight = ", ".join(f"{task} {value}" for task, value in results.shown["weight"].items())
    hashes = dict.fromkeys((one["row"], one["sha256"][:12]) for one in results.found if one["sha256"])
    devices = dict.fromkeys(one["device"] for one in results.found)
    parts = [
        "# The miniature's adapters on held-out combinations",
        "Shares of pictures, by the oracle, with Wilson's 95 % intervals. "
        f"Settings: {settings}; where a table says no other, {results.shown['wording']} wordings and the weights "
        f"{weight}. Made on {', '.join(devices)}.",
        f"“{NO_ADAPTER}” is the bare base with the same prompts and noise: what it has of a condition is chance. "
        "“condition X”: the picture shows the condition's X, counted where the prompt leaves X to the condition or "
        "says another. “prompt X”: it shows the X that the prompt says. Differences have Newcombe's 95 % intervals. "
        "Leaks of 0.00 throughout a table are left out, but for those with a target, and so is what has none and is "
        "the same for all rows, wordings or weights.",
        "Adapters: " + ", ".join(f"{row} `{sha256}`" for row, sha256 in hashes),
    ]
    if picture.is_file():
        parts.append(f"![The same conditions under each instruction]({picture.name})")
    return "\n\n".join(parts)


def tasks(results: Results) -> str:
    """Each trial's figures, with the targets, and whether the joint adapter meets them and betters IPAdapter+."""
    rows = list(dict.fromkeys(row for trial in AIMS for row in results.rows(trial)))
    lines = []
    for trial, aims in AIMS.items():
        rates = {row: results.rates(trial, row) for row in rows}
        for aim in aims:
            found = [one.get(aim.figure) for one in rates.values()]
            alike = len({f"{rate.share:.2f}" for rate in found if rate}) == 1 < len(rows)
            if tells(aim, found, bool(aim.target)) and (aim.target or not alike):
                lines.append([trial, *_task_line(aim, rates)])
    verdicts = [line[-2] for line in lines if line[-2] and line[0] in TASK_TRIALS]
    parts = [
        f"The joint adapter meets {verdicts.count('yes')} of the five tasks' {len(verdicts)} targets.",
        table(["asked for", "", "target", *rows, "joint meets it", "joint − plain"], lines),
    ]
    for (trial, figure), most in CHANCE_AT_MOST.items():
        chance = results.rates(trial, NO_ADAPTER).get(figure)
        if chance is not None:
            parts.append(f"Chance of {trial}, {figure}: {text(chance)}, which should be at most {most}.")
    return "\n\n".join(["## Tasks", *parts]) if lines else ""


def _task_line(aim: Aim, rates: Mapping[str, Rates]) -> list[str]:
    joint, plain, chance = (rates.get(row, {}).get(aim.figure) for row in (JOINT, PLAIN, NO_ADAPTER))
    cells = [text(one.get(aim.figure)) for one in rates.values()]
    met = "" if joint is None else aim.met(joint, chance)
    return [f"leak: {aim.figure}" if aim.leak else aim.figure, aim.target, *cells, met, change(joint, plain, aim.leak)]


def equal_steps(results: Results) -> str:
    """The joint adapter beside those of one task each, and beside that of one wording a task."""
    others = [row for row in (SINGLE, FIXED) if results.rates("style", row)]
    lines = []
    for trial in TASK_TRIALS:
        joint, *rest = (results.rates(trial, row) for row in (JOINT, *others))
        for aim in AIMS[trial]:
            found = [rates.get(aim.figure) for rates in (joint, *rest)]
            if all(found) and (aim.target or aim.leak) and tells(aim, found):
                one, *two = found
                changes = [change(one, other, aim.leak) for other in two]
                lines.append([trial, aim.figure, *map(text, (one, *two)), *changes])
    titles = ["task", "", JOINT, *others, *(f"joint − {other}" for other in others)]
    return "## Joint, single-task and one wording a task\n\n" + table(titles, lines) if others and lines else ""


def wordings(results: Results) -> str:
    """Each row that was told in several wordings."""
    rows = [row for row in results.rows("style") if len(results.measured(row, "wording")) > 1]
    columns = [(row, words) for row in rows for words in WORDINGS]
    lines = _lines(columns, lambda trial, column: results.rates(trial, column[0], wording=column[1]))
    titles = ["task", "", *(f"{row}, {words} wording" for row, words in columns)]
    return "## Wordings of the instructions\n\n" + table(titles, lines) if lines else ""


def weights(results: Results) -> str:
    """Each row that was measured at several weights."""
    parts = []
    for row in dict.fromkeys(one["row"] for one in results.found):
        columns = results.measured(row, "weight")
        if len(columns) > 2:  # the reference's own are two
            lines = _lines(columns, lambda trial, weight, row=row: results.rates(trial, row, weight=weight))
            parts.append(f"### {row.capitalize()}\n\n" + table(["task", "", *map(str, columns)], lines))
    return "\n\n".join(["## Weights", *parts]) if parts else ""


def combinations(results: Results) -> str:
    """Each row that was measured on combinations that training has shown, beside those that it has not."""
    columns = [(row, suffix) for row in results.rows("style, known") for suffix in ("", ", known")]
    lines = _lines(columns, lambda trial, column: results.rates(trial + column[1], column[0]))
    titles = ["task", "", *(f"{row}{suffix or ', held out'}" for row, suffix in columns)]
    return "## Combinations that training has shown\n\n" + table(titles, lines) if lines else ""


def _lines(columns: Sequence[Any], rates: Callable[[str, Any], Rates]) -> list[list[str]]:
    """A line for each figure of the tasks that has a target or is a leak. One that is the same in every column is left
    out, unless all are.

    Args:
        rates: trial, column -> its figures.
    """
    lines, alike = [], []
    for trial in TASK_TRIALS:
        every = [rates(trial, column) for column in columns]
        for aim in AIMS[trial]:
            found = [one.get(aim.figure) for one in every]
            shown = {f"{rate.share:.2f}" for rate in found if rate}
            if (aim.target or aim.leak) and tells(aim, found):
                (lines if len(shown) > 1 else alike).append([trial, aim.figure, *map(text, found)])
    return lines or alike


def crossing(results: Results) -> str:
    """Instructions by factors: what pictures of the same conditions have of them."""
    parts = []
    for who, tasks in CROSSED_TASKS.items():
        for prompt in PROMPTS:
            trials = {task: crossed_trial(who, prompt, task) for task in tasks}
            rows = dict.fromkeys(row for trial in trials.values() for row in results.rows(trial))
            sources = SOURCES[:1] if prompt == "no" else SOURCES
            lines = [
                _matrix_line(results.rates(trial, row), row, task, CROSSED_FACTORS[who], sources)
                for row in rows
                for task, trial in trials.items()
            ]
            if lines:
                factors = [factor.capitalize() for factor in CROSSED_FACTORS[who]]
                parts.append(f"### {who.capitalize()}, {prompt} prompt\n\n" + table(["", "told", *factors], lines))
    count = results.settings["count"]
    about = CROSSING.format(count=count, reach=Rate(count // 2, count).interval[1] - 0.5)
    return "\n\n".join(["## The same conditions under each instruction", about, *parts]) if parts else ""


def _matrix_line(rates: Rates, row: str, task: Task, factors: Sequence[str], sources: Sequence[str]) -> list[str]:
    cells = []
    for factor in factors:
        shares = [f"{rates[name].share:.2f}" if (name := f"{of} {factor}") in rates else "–" for of in sources]
        if factor in WANTED[task]:
            shares[0] = f"**{shares[0]}**"
        cells.append(" / ".join(shares))
    return [row, task.value, *cells]
