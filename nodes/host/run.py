"""The state of one sampling run: which row is whose, and the keys and values that the slots attend to.

Made when sampling starts, once the models are loaded, and dropped with it; nothing of it is on a MODEL.
"""

import uuid
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ipadapter_instruct_core.guidance import Row
from . import log
from .application import Application, Chain, ThreeWay
from .call import Cell, ModelCall
from .memory import module_dtype
from .slots import cross_attentions

RUN = "ipadapter_instruct_run"
# Guiders' names of the lists whose rows carry the picture; every other list counts as negative.
POSITIVE_LISTS = ("positive", "middle")


class Kept(NamedTuple):
    """What three-way guidance evaluated beside the sampler's two predictions, until the step's guidance is done."""

    scales: ThreeWay
    predictions: dict[Row, Tensor]


class SamplingRun:
    """Rows, scales and prepared keys and values of one sampling run."""

    def __init__(self, guider: Any, chain: Chain, noise: Tensor) -> None:
        self.guider = guider
        self.chain = chain
        self.items = noise.shape[0]
        self.latent_size = tuple(noise.shape[-2:])
        self.cells: dict[uuid.UUID, Cell] = {}
        self.places: dict[Row, int] = {}  # where the last three-way call held the guider's two lists
        self.said: set[str] = set()
        self.kept: Kept | None = None
        self.derived: dict[Row, list[dict]] = {}
        self.calls: dict[tuple, ModelCall] = {}
        sampling = guider.model_patcher.get_model_object("model_sampling")
        self.ranges = {
            a: (float(sampling.percent_to_sigma(a.start_percent)), float(sampling.percent_to_sigma(a.end_percent)))
            for a in chain.applications
            if not a.always
        }
        self._everyone = frozenset(chain.applications)
        self._name_rows()

    def _name_rows(self) -> None:
        """Give each conditioning a uuid of its own, since the host copies them, uuid and all, between roles
        under area conditioning, and derive the rows that three-way guidance adds."""
        for name, conds in self.guider.conds.items():
            row = Row.FULL if name in POSITIVE_LISTS else Row.UNCOND
            for cond in conds or []:
                self._name(cond, row)
        if not self.chain.may_be_three_way:
            return
        if set(self.guider.conds) == {"positive", "negative"}:
            for row in (Row.EVERYTHING, Row.IMAGE):
                self.derived[row] = [self._derive(cond, row) for cond in self.guider.conds["negative"]]
        else:
            log.info(
                "Three-way guidance needs a sampler with one positive and one negative prompt; "
                "this one has %s, so simple guidance is used.",
                ", ".join(self.guider.conds),
            )

    def warn(self, sentence: str) -> None:
        """Say something to the user, once a run."""
        if sentence not in self.said:
            self.said.add(sentence)
            log.warning(sentence)

    def _name(self, cond: dict, row: Row) -> dict:
        cond["uuid"] = uuid.uuid4()
        area = cond.get("area")
        self.cells[cond["uuid"]] = Cell(row, tuple(area) if area is not None else None)
        return cond

    def _derive(self, negative: dict, row: Row) -> dict:
        """A row with the negative text, its control, area, mask and hooks, and SDXL's positive pooled vector."""
        cond = self._name(negative.copy(), row)
        positives = self.guider.conds["positive"]
        same_area = [p for p in positives if p.get("area") == negative.get("area")]
        donor = next(iter(same_area or positives), None)
        if donor is not None and "y" in donor["model_conds"] and "y" in cond["model_conds"]:
            cond["model_conds"] = cond["model_conds"] | {"y": donor["model_conds"]["y"]}
        return cond

    def active(self, timestep: Tensor) -> frozenset[Application]:
        """The applications that act at this step; reads the step back from the device only if one has a range."""
        if not self.ranges:
            return self._everyone
        sigma = float(timestep[0])
        return frozenset(
            a for a in self._everyone if a not in self.ranges or self.ranges[a][1] <= sigma <= self.ranges[a][0]
        )

    def scales(self, active: frozenset[Application]) -> ThreeWay | None:
        return self.chain.scales(active) if self.derived else None

    @cached_property
    def heads(self) -> list[int]:
        """Of every layer."""
        return [slot.heads for slot in cross_attentions(self.guider.model_patcher.model.diffusion_model)]

    @cached_property
    def key_values(self) -> dict[Application, dict[Row, list[tuple[Tensor, Tensor]]]]:
        """Of each application and row, the keys and (weighted) values [N, T, width] of every layer.

        Computed once a run, in one batch of rows, where the host has put the adapter's weights.
        """
        rows = [Row.FULL, Row.UNCOND, *self.derived]
        prepared = {}
        for application in self.chain.applications:
            adapter = application.adapter
            tokens = [self.chain.tokens(application, row) for row in rows]
            batch = torch.cat(tokens).to(adapter.patcher.load_device, module_dtype(adapter.adapter))
            layers = adapter.adapter.key_values(batch)
            counts = [len(t) for t in tokens]
            split = [(k.split(counts), (v * application.weight).split(counts)) for k, v in layers]
            prepared[application] = {row: [(k[i], v[i]) for k, v in split] for i, row in enumerate(rows)}
        return prepared

    def call(self, options: dict[str, Any], x: Tensor, dtype: torch.dtype, active: frozenset[Application]) -> ModelCall:
        """The prepared model call for these rows: the same object whenever the same rows come again."""
        cells = tuple(self.cells.get(u, Cell(Row.UNCOND)) for u in options.get("uuids", ()))
        indices = self._items_of(options, len(x) // max(len(cells), 1))
        key = (cells, indices, x.shape, x.device, dtype, active)
        if key not in self.calls:
            self.calls[key] = ModelCall(self, cells, indices, x, dtype, active)
        return self.calls[key].at(options.get("sigmas"))

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
