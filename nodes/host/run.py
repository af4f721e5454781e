"""The state of one sampling run: which row is whose, and the keys and values that the slots attend to.

Made when sampling starts, once the models are loaded, and dropped with it; nothing of it is on a MODEL.
"""

import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ipadapter_instruct_core.curves import Curve, CurveTable
from ...ipadapter_instruct_core.guidance import Row
from . import log
from .application import Application, Chain, ThreeWay
from .call import Cell, ModelCall
from .prepared import prepare

RUN = "ipadapter_instruct_run"
STRETCHES = 256  # of a curve over the noise levels
MOST_WINDOWS = 16  # kept at once: context windows that move with each step come in any number
# Guiders' names of the lists whose rows carry the picture; every other list counts as negative.
POSITIVE_LISTS = ("positive", "middle")
KNOWN_LISTS = (*POSITIVE_LISTS, "negative")
# Where a guider has no list of the name "positive", the beginnings of the words in their names tell them.
NEGATIVE_WORDS, POSITIVE_WORDS = ("neg", "uncond", "empty"), ("pos", "cond", "prompt", "middle")
ADDED = (Row.EVERYTHING, Row.IMAGE)


class Kept(NamedTuple):
    """What three-way guidance evaluated beside the sampler's two predictions, until the step's guidance is done.

    Attributes:
        pair: what the sampler was given for its positive and negative.
        derived: the conditionings of both added rows, evaluated or not.
        others: whether anyone else takes part in this step's guidance, or may.
    """

    scales: ThreeWay
    pair: tuple[Tensor, Tensor]
    predictions: dict[Row, Tensor]
    derived: dict[Row, list[dict]]
    others: bool


class Alone(NamedTuple):
    """One of the sampler's two lists that came in a call without the other."""

    scales: ThreeWay
    conds: list[dict]
    prediction: Tensor


class SamplingRun:
    """Rows, scales and prepared keys and values of one sampling run."""

    def __init__(self, guider: Any, chain: Chain, noise: Tensor) -> None:
        self.guider = guider
        self.chain = chain
        self.items = noise.shape[0]
        self.shape = noise.shape
        self.latent_size = tuple(noise.shape[-2:])
        self.cells: dict[uuid.UUID, Cell] = {}
        self.untold: dict[uuid.UUID, str] = {}  # the list's name, where it does not say what it is
        self.numbers: dict[uuid.UUID, int] = {}  # of the list, in the last call that held it
        self.places: dict[Row, int] = {}  # where the last three-way call held the guider's two lists
        self.said: set[str] = set()
        self.wrapped = False  # someone stands between the host's calls and the model
        self.lost = False  # another patch changed rows in a way that cannot be followed
        self.kept: list[Kept] = []
        self.alone: dict[Row, Alone] = {}
        self.rows = 0  # of all lists of the last evaluation
        self.calls: dict[tuple, ModelCall] = {}
        self.windows: OrderedDict[tuple, ModelCall] = OrderedDict()  # those of some of the latents alone
        self.masks: dict[tuple, Tensor] = {}  # each application's, by area and size
        self._derived_uuids: dict[tuple[uuid.UUID | None, Row], uuid.UUID] = {}
        sampling = guider.model_patcher.get_model_object("model_sampling")
        self.ranges = {a: _range(a, sampling.percent_to_sigma) for a in chain.applications if not a.always}
        self._by_latent = any(map(_differs_by_latent, chain.applications))
        self.curves = {
            a: _curve_table(a, sampling.percent_to_sigma) for a in chain.applications if a.curve is not Curve.CONSTANT
        }
        self._everyone = frozenset(chain.applications)
        self.three_way = self._name_rows() and chain.may_be_three_way
        rows = [Row.FULL, Row.UNCOND, *(ADDED if self.three_way else ())]
        tokens = {a: {row: a.tokens[chain.row(a, row)] for row in rows} for a in chain.applications}
        # Now, and not by the call that asks first: several cards are called in a thread each.
        self.prepared = {a: prepare(a.adapter, tokens[a], guider.model_patcher, a.weight) for a in chain.applications}

    def _name_rows(self) -> bool:
        """Give each conditioning a uuid of its own, since the host copies them, uuid and all, between roles
        under area conditioning. Returns whether there are two lists, as three-way guidance needs."""
        lists = {name: conds for name, conds in self.guider.conds.items() if _are_conds(conds)}
        guessed = {} if "positive" in lists else _rows_by_names(lists)
        for name, conds in lists.items():
            row = guessed[name] if guessed else Row.FULL if name in POSITIVE_LISTS else Row.UNCOND
            for cond in conds:
                self._name(cond, row or Row.FULL)
                if row is None:
                    self.untold[cond["uuid"]] = name
        told = ", ".join(
            f"{name} for the {_role(row)}" for name, row in guessed.items() if row and name not in KNOWN_LISTS
        )
        if told:
            self.tell(f"This sampler has its own names for its prompts: IPAdapter-Instruct takes {told}.")
        if len(lists) != 2 and self.chain.may_be_three_way:
            self.tell(
                "Three-way guidance needs a sampler with one positive and one negative prompt; "
                f"this one has {', '.join(lists)}, so simple guidance is used."
            )
        return len(lists) == 2

    def tell(self, sentence: str) -> None:
        self._say(log.info, sentence)

    def warn(self, sentence: str) -> None:
        self._say(log.warning, sentence)

    def _say(self, how: Callable[[str], None], sentence: str) -> None:
        """To the user, once a run."""
        if sentence not in self.said:
            self.said.add(sentence)
            how(sentence)

    def _name(self, cond: dict, row: Row) -> None:
        cond["uuid"] = uuid.uuid4()
        self.cells[cond["uuid"]] = Cell(row, _area(cond))

    def look_at(self, conds: list) -> None:
        """Learn from a call's lists their numbers, and the positive by its place where no name told: the host's own
        function puts it first."""
        for number, some in enumerate(conds):
            for cond in some if _are_conds(some) else ():
                key = cond.get("uuid")
                self.numbers[key] = number
                if key in self.untold:
                    name, row = self.untold.pop(key), Row.UNCOND if number else Row.FULL
                    self.cells[key] = Cell(row, _area(cond))
                    self.tell(f"This sampler does not say what {name} is: taken for the {_role(row)} by its place.")

    def row_of(self, conds: Any) -> Row | None:
        """What a call's list is, told by its first conditioning; None for what is not the guider's."""
        cell = self.cells.get(conds[0].get("uuid")) if _are_conds(conds) else None
        return None if cell is None else cell.row

    def derive(self, row: Row, negatives: list[dict], positives: list[dict], sigma: Callable[[], float]) -> list[dict]:
        """The conditionings of an added row: the negative's text, control, area, mask and hooks as this call has them,
        and of SDXL's pooled vectors the one of the positive that is in force."""
        return [self._derive(row, negative, positives, sigma) for negative in negatives]

    def _derive(self, row: Row, negative: dict, positives: list[dict], sigma: Callable[[], float]) -> dict:
        key = self._derived_uuids.setdefault((negative.get("uuid"), row), uuid.uuid4())
        self.cells[key] = Cell(row, _area(negative))
        cond = negative | {"uuid": key}
        if "y" not in negative.get("model_conds", ()):
            return cond
        donors = [p for p in positives if "y" in p.get("model_conds", ())]
        donors = [p for p in donors if _in_force(p, sigma)] or donors
        donors = [p for p in donors if p.get("area") == negative.get("area")] or donors
        return cond | {"model_conds": cond["model_conds"] | {"y": donors[0]["model_conds"]["y"]}} if donors else cond

    def active(self, sigma: Callable[[], float]) -> frozenset[Application]:
        """The applications that act at this step; reads the step back from the device only if one has a range."""
        if not self.ranges:
            return self._everyone
        now = sigma()
        return frozenset(
            a for a in self._everyone if a not in self.ranges or self.ranges[a][1] <= now <= self.ranges[a][0]
        )

    def scales(self, active: frozenset[Application]) -> ThreeWay | None:
        return self.chain.scales(active) if self.three_way else None

    def call(self, options: dict[str, Any], x: Tensor, dtype: torch.dtype, active: frozenset[Application]) -> ModelCall:
        """The prepared model call for these rows: the same object whenever the same rows come again."""
        uuids = options.get("uuids", ())
        shown = tuple(options.get("cond_or_uncond", range(len(uuids))))
        by_number = {self.numbers.get(key): key for key in uuids}
        stale = len(uuids) != len(shown) or (self.wrapped and tuple(map(self.numbers.get, uuids)) != shown)
        if stale and by_number.keys() >= set(shown):
            # A wrapper has dropped, repeated or reordered rows, and told so only in the list that everyone reads.
            uuids = [by_number[number] for number in shown]
        cells = tuple(self.cells.get(key, Cell(Row.UNCOND)) for key in uuids)
        indices = self._items_of(options, len(x) // max(len(cells), 1))
        key = (cells, shown, indices if self._by_latent else len(indices), x.shape, x.device, dtype, active)
        calls = self.windows if self._by_latent and indices != tuple(range(self.items)) else self.calls
        if key not in calls:
            calls[key] = ModelCall(self, cells, shown, indices, x, dtype, active)
        if calls is self.windows:
            self.windows.move_to_end(key)
            if len(self.windows) > MOST_WINDOWS:
                self.windows.popitem(last=False)
        return calls[key].at(options.get("sigmas"))

    def _items_of(self, options: dict[str, Any], length: int) -> tuple[int, ...]:
        """Which latents of the batch a call holds for each row, where it holds ``length`` of them."""
        window = options.get("context_window")
        if getattr(window, "dim", None) == 0:
            # Asked of the window itself: newer hosts put an anchor from outside before what it lists.
            return tuple(window.get_tensor(torch.arange(self.items)).tolist())
        if length % self.items == 0:
            return tuple(range(self.items))
        # Part of the batch, as AnimateDiff's windows are; they say which, in options of their own.
        part = (options.get("ad_params") or {}).get("sub_idxs") or range(length)
        return tuple(part) if len(part) == length else tuple(range(length))


def _range(application: Application, percent_to_sigma: Callable[[float], Any]) -> tuple[float, float]:
    """The noise levels between which an application acts. Its very beginning is asked of no model: rounded, a sampler's
    first level may lie above what the model calls the highest."""
    start, end = application.start_percent, application.end_percent
    return float("inf" if start <= 0 else percent_to_sigma(start)), float(percent_to_sigma(end))


def _differs_by_latent(application: Application) -> bool:
    """Whether any latent of a batch has a picture or a mask of its own."""
    each = [*application.tokens.values(), *(application.bias or {}).values(), application.mask]
    return any(some is not None and len(some) > 1 for some in each)


def _curve_table(application: Application, percent_to_sigma: Callable[[float], Any]) -> CurveTable:
    """An application's curve over the noise levels of the part of sampling that it acts in."""
    start, end = application.start_percent, application.end_percent
    points = []
    for place in range(STRETCHES, -1, -1):
        progress = place / STRETCHES
        # The host has special answers for the very ends, which lie outside of what a sampler asks for.
        percent = min(max(start + (end - start) * progress, 1e-6), 1 - 1e-6)
        points.append((float(percent_to_sigma(percent)), application.curve.factor(progress)))
    return CurveTable.of(points)


def _are_conds(conds: Any) -> bool:
    return isinstance(conds, list) and bool(conds) and isinstance(conds[0], dict)


def _area(cond: dict) -> tuple[int, ...] | None:
    area = cond.get("area")
    return None if area is None else tuple(area)


def _rows_by_names(names: Iterable[str]) -> dict[str, Row | None]:
    """What lists of unknown names are; None where only their places in a call can tell."""
    rows = {name: _row_by_name(name) for name in names}
    told = set(rows.values()) - {None}
    if told == {Row.FULL} and len(rows) > 1 and None not in rows.values():
        return dict.fromkeys(rows)  # all cannot be positives
    if len(told) == 1:
        other = Row.UNCOND if told == {Row.FULL} else Row.FULL
        return {name: row or other for name, row in rows.items()}
    return rows


def _row_by_name(name: str) -> Row | None:
    words = re.findall(r"[a-z]+", name.lower())
    if any(word.startswith(NEGATIVE_WORDS) for word in words):
        return Row.UNCOND
    return Row.FULL if any(word.startswith(POSITIVE_WORDS) for word in words) else None


def _role(row: Row) -> str:
    return "positive" if row is Row.FULL else "negative"


def _in_force(cond: dict, sigma: Callable[[], float]) -> bool:
    """Whether the host evaluates a conditioning at this step, by its own rule."""
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    if start is None and end is None:
        return True
    return (start is None or sigma() <= start) and (end is None or sigma() >= end)
