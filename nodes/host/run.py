"""The state of one sampling run: which row is whose, and the keys and values that the slots attend to.

Made when sampling starts, once the models are loaded, and dropped with it; nothing of it is on a MODEL.
"""

import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...ipadapter_instruct_core.attention import split_heads
from ...ipadapter_instruct_core.guidance import Row
from . import log
from .application import Application, Chain, ThreeWay
from .memory import module_dtype

RUN = "ipadapter_instruct_run"
# Guiders' names of the lists whose rows carry the picture; every other list counts as negative.
POSITIVE_LISTS = ("positive", "middle")


@dataclass(frozen=True)
class Cell:
    """What one conditioning stands for: its row, and its area as the host resolved it (h, w, y, x), if any."""

    row: Row
    area: tuple[int, ...] | None = None


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
        self.warned_of_tiles = False
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

    def call(self, options: dict[str, Any], batch: int, active: frozenset[Application]) -> "ModelCall":
        """The prepared model call for these rows: the same object whenever the same rows come again."""
        cells = tuple(self.cells.get(u, Cell(Row.UNCOND)) for u in options.get("uuids", ()))
        indices = self._items_of(options, batch // max(len(cells), 1))
        key = (cells, indices, batch, active)
        if key not in self.calls:
            self.calls[key] = ModelCall(self, cells, indices, batch, active)
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


class ModelCall:
    """One arrangement of rows in a batch: hands each slot its keys, values and mask, prepared on first use."""

    def __init__(
        self, run: SamplingRun, cells: tuple[Cell, ...], indices: tuple[int, ...], batch: int, active: frozenset
    ) -> None:
        self.run = run
        self.cells = cells
        self.indices = indices
        # A tiling model wrapper stacks its tiles, each with all rows, so the rows repeat.
        self.repeats = batch // max(len(cells) * len(indices), 1)
        self.fits = self.repeats * len(cells) * len(indices) == batch and self.repeats > 0
        self.applications = active if self.fits else frozenset()
        if not self.fits:
            log.warning(
                "A model wrapper changed the batch (%d rows of %d), so the adapter is off in it.", batch, len(cells)
            )
        self._key_values: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple, Tensor | None] = {}
        self._sigmas: Tensor | None = None
        self._sigma: float | None = None

    def at(self, sigmas: Tensor | None) -> "ModelCall":
        self._sigmas, self._sigma = sigmas, None
        return self

    def sigma(self) -> float:
        """The noise level, read back from the device once a call however many slots ask."""
        if self._sigma is None:
            self._sigma = float(self._sigmas[0]) if self._sigmas is not None else float("inf")
        return self._sigma

    def options_for_others(self, options: dict[str, Any]) -> dict[str, Any]:
        """What another pack's patch in our slot is told: it indexes its own positive and negative by
        ``cond_or_uncond``, and knows none of the rows that three-way guidance added. Its picture takes part
        in the "everything" row and not in the "image" row, which leaves it the text scale (see `Chain.tokens`).

        Everyone else is shown the true indices: self-attention guidance, say, looks for the negative row's."""
        if not any(cell.row in (Row.EVERYTHING, Row.IMAGE) for cell in self.cells):
            return options
        places = self.run.places
        stand_for = {Row.EVERYTHING: places[Row.FULL], Row.IMAGE: places[Row.UNCOND]}
        shown = zip(self.cells, options["cond_or_uncond"], strict=True)
        return options | {"cond_or_uncond": [stand_for.get(cell.row, i) for cell, i in shown]}

    def is_active(self, application: Application) -> bool:
        return application in self.applications

    def key_values(self, application: Application, layer: int, q: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, d] of a layer for every row of the batch, where and as ``q`` is."""
        key = (application, layer, q.device, q.dtype)
        found = self._key_values.get(key)
        if found is None:
            rows = self.run.key_values[application]
            pairs = [rows[cell.row][layer] for cell in self.cells]
            dealt = (self._deal([pair[i] for pair in pairs], q) for i in (0, 1))
            found = tuple(split_heads(each, heads).contiguous() for each in dealt)
            self._key_values[key] = found
        return found

    def _deal(self, rows: list[Tensor], q: Tensor) -> Tensor:
        """One [N, X, Y] a row -> [B, X, Y] of the batch, where and as ``q`` is: N dealt out to the latents in turn."""
        stacked = torch.cat([row[[i % len(row) for i in self.indices]] for row in rows])
        return stacked.repeat(self.repeats, 1, 1).to(q.device, q.dtype)

    def _warn_of_tiles(self) -> None:
        if self.repeats > 1 and not self.run.warned_of_tiles:
            self.run.warned_of_tiles = True
            log.warning("A tiling model wrapper hides where its tiles lie, so the mask is put over each tile whole.")

    def mask(self, application: Application, q: Tensor, activations_shape: list[int]) -> Tensor | None:
        """The mask at a layer's resolution, [B, P, 1], or None."""
        if application.mask is None:
            return None
        self._warn_of_tiles()
        size = tuple(activations_shape[-2:])
        key = (application, size, q.device, q.dtype)
        if key not in self._masks:
            rows = [_mask_of(application.mask, cell.area, self.run.latent_size, size) for cell in self.cells]
            self._masks[key] = self._deal([row.flatten(1).unsqueeze(-1) for row in rows], q)
        return self._masks[key]


def _mask_of(mask: Tensor, area: tuple[int, ...] | None, latent: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Masks [M, H, W] over the whole picture -> [M, *size], cut to the area of the latent that a row is sampled in.

    Averaged, not blended: an edge that lies between two latent pixels stays there."""
    if area is not None:
        height, width, top, left = area
        mask = interpolate(mask.unsqueeze(1), size=latent, mode="area").squeeze(1)
        mask = mask[:, top : top + height, left : left + width]
    return interpolate(mask.unsqueeze(1), size=size, mode="area").squeeze(1)
