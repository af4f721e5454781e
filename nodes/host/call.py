"""One call of the model while a picture is sampled: what each slot attends to, prepared before the model is entered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...ipadapter_instruct_core.attention import split_heads
from ...ipadapter_instruct_core.guidance import Row
from ...ipadapter_instruct_core.image_kv import Layer
from . import log
from .application import Application

if TYPE_CHECKING:
    from .run import SamplingRun

NEGATIVE = 1  # the place of the negative among the host's lists, by which other packs know it
HALVINGS = 4  # how often a UNet halves its latent at most; masks are made for each size beforehand


class Acting(NamedTuple):
    """What the slots need of an application that acts.

    Attributes:
        layers: of the adapter, one a site.
        key_values: of each, [B, H, T, d] for every row of the batch.
        bias: [B or 1, 1, 1, T], of each token's logits, or None.
        weight: [1, 1, 1], at this step.
    """

    layers: list[Layer]
    key_values: list[tuple[Tensor, Tensor]]
    bias: Tensor | None
    weight: Tensor


@dataclass(frozen=True)
class Cell:
    """What one conditioning stands for: its row, and its area as the host resolved it (h, w, y, x), if any."""

    row: Row
    area: tuple[int, ...] | None = None


class ModelCall:
    """One arrangement of rows in a batch.

    The slots only read from it, by numbers and sizes: they may be inside a compiled graph, which then stays whole, and
    stays as it is when a weight or a picture changes.

    Attributes:
        acting: at the place of each application in the chain; None for one that does not act.
        halved: height and width of the latent after one halving, as a transformer's patches have it.
    """

    def __init__(
        self,
        run: SamplingRun,
        cells: tuple[Cell, ...],
        shown: tuple[int, ...],
        indices: tuple[int, ...],
        x: Tensor,
        dtype: torch.dtype,
        active: frozenset[Application],
    ) -> None:
        self.run = run
        self.cells = cells
        self.shown = shown  # the rows' numbers, as the host shows them to everyone
        self.batch = len(x)
        self.indices = indices
        self.device, self.dtype = x.device, dtype
        # A tiling model wrapper stacks its tiles, each with all rows, so the rows repeat.
        self.repeats = len(x) // max(len(cells) * len(indices), 1)
        fits = self.repeats * len(cells) * len(indices) == len(x) and self.repeats > 0
        if not fits:
            log.warning(
                "A model wrapper changed the batch (%d rows of %d), so the adapter is off in it.", len(x), len(cells)
            )
        acting = [a if fits and a in active else None for a in run.chain.applications]
        self.acting = [None if a is None else self._prepared(a) for a in acting]
        self._weights = [None if a is None else a.weight for a in self.acting]  # before the curve
        self._curves = [None if a is None or a not in run.curves else run.curves[a].to(x.device) for a in acting]
        self._factors: list[Tensor | None] = [None for _ in acting]
        self._pictures = [None if a is None or a.mask is None else a.mask for a in acting]
        self._gains: list[dict[tuple, Tensor]] = [{} for _ in acting]
        size = tuple(x.shape[-2:])
        self.halved = tuple((length + 1) // 2 for length in size)
        for _ in range(HALVINGS):
            for place, picture in enumerate(self._pictures):
                if picture is not None:
                    self._gains[place][size, size[0] * size[1]] = self._mask(place, size)
            size = tuple((length + 1) // 2 for length in size)
        if self.repeats > 1 and any(picture is not None for picture in self._pictures):
            run.warn("A tiling model wrapper hides where its tiles lie, so the mask is put over each tile whole.")
        self._sigmas: Tensor | None = None
        self._sigma: float | None = None

    @cached_property
    def structure(self) -> str:
        """What a compiled graph of this call depends on beside the sizes of the model's inputs: who acts, by how many
        tokens, with a mask, a curve, a bias of the tokens."""
        parts = zip(self.acting, self._pictures, self._curves, strict=True)
        return "_".join(
            "off"
            if acting is None
            else f"{acting.key_values[0][0].shape[2]}{'m' * (mask is not None)}"
            f"{'c' * (curve is not None)}{'b' * (acting.bias is not None)}"
            for acting, mask, curve in parts
        )

    def at(self, sigmas: Tensor | None) -> ModelCall:
        self._sigmas, self._sigma = sigmas, None
        for place, curve in enumerate(self._curves):
            if curve is not None and sigmas is not None:
                factor = self._factors[place] = curve.factor(sigmas).to(self.dtype)
                self.acting[place] = self.acting[place]._replace(weight=self._weights[place] * factor)
        return self

    def sigma(self) -> float:
        """The noise level, read back from the device once a call however many slots ask."""
        if self._sigma is None:
            self._sigma = float(self._sigmas[0]) if self._sigmas is not None else float("inf")
        return self._sigma

    def options_for_others(self, options: dict[str, Any]) -> dict[str, Any]:
        """What another pack's patch in our slot is told: it indexes its own positive and negative by
        ``cond_or_uncond``, and knows none of the rows that three-way guidance added. Its picture takes part
        in the "everything" row and not in the "image" row, which leaves it the text scale (see `Chain.row`).

        Everyone else is shown the true indices: self-attention guidance, say, looks for the negative row's."""
        if not any(cell.row in (Row.EVERYTHING, Row.IMAGE) for cell in self.cells):
            return options
        places = self.run.places
        stand_for = {Row.EVERYTHING: places[Row.FULL], Row.IMAGE: places[Row.UNCOND]}
        shown = zip(self.cells, self.shown, strict=True)
        return options | {"cond_or_uncond": [stand_for.get(cell.row, i) for cell, i in shown]}

    def gain(self, place: int, size: tuple[int, ...], positions: int) -> Tensor:
        """What the addition of an application is multiplied with: its weight [1, 1, 1], or times its mask at a site's
        resolution [B, positions, 1]. Positions of text, which stand before the picture's, have the mask's mean."""
        if self._pictures[place] is None:
            return self.acting[place].weight
        gains = self._gains[place]
        found = gains.get((size, positions))
        if found is None:  # another pack scales the latent inside the model, or text is there too
            mask = self._mask(place, size)
            text = mask.mean(1, keepdim=True).expand(-1, positions - mask.shape[1], -1)
            found = torch.cat([text, mask], dim=1)
            if not torch.compiler.is_compiling():
                gains[size, positions] = found
        factor = self._factors[place]
        return found if factor is None else found * factor

    def repeated(self, tensors: tuple[Tensor, ...], rows: int, shown: list[int]) -> list[Tensor] | None:
        """Tensors of this batch for a slot that is asked with more ``rows`` than the batch has, as regional prompts do:
        a patch before the slot has repeated some. None, and the adapter off, where it cannot be told which."""
        times = self._times(rows, shown)
        if times is None:
            self.run.lost = True
            self.run.warn("Another patch changed the rows inside the model, so the adapter is off where it does.")
            return None
        return [each if len(each) != self.batch else _repeat(each, times) for each in tensors]

    def _times(self, rows: int, shown: list[int]) -> list[int] | None:
        """How often each row stands there."""
        wanted = rows // (self.batch // len(self.cells))
        if len(shown) == wanted:  # the patch keeps the list of rows true
            times = [shown.count(number) // self.shown.count(number) for number in self.shown]
        else:
            # Whatever is not the negative counts as positive, and is what such patches repeat; alone, all rows are.
            repeats = [number != NEGATIVE for number in self.shown]
            repeats = repeats if any(repeats) else [True] * len(repeats)
            each = (wanted - repeats.count(False)) // repeats.count(True)
            times = [each if repeat else 1 for repeat in repeats]
            if sum(times) != wanted and wanted % len(times) == 0:
                times = [wanted // len(times)] * len(times)
        return times if min(times) > 0 and sum(times) * self.batch == rows * len(times) and self.repeats == 1 else None

    def _prepared(self, application: Application) -> Acting:
        prepared = self.run.prepared[application]
        layers = zip(*(prepared.key_values[cell.row] for cell in self.cells), strict=True)
        key_values = [
            tuple(split_heads(self._deal(list(each)), site.heads).contiguous() for each in zip(*pairs, strict=True))
            for pairs, site in zip(layers, prepared.sites, strict=True)
        ]
        bias = None if prepared.bias is None else prepared.bias.to(self.device, self.dtype)
        if application.bias is not None:
            rows = [application.bias[self.run.chain.row(application, cell.row)] for cell in self.cells]
            shares = self._deal(rows).unsqueeze(1)
            bias = shares if bias is None else bias + shares
        weight = torch.full((1, 1, 1), prepared.weight, device=self.device, dtype=self.dtype)
        return Acting(prepared.layers, key_values, bias, weight)

    def _deal(self, rows: list[Tensor]) -> Tensor:
        """One [N, X, Y] a row -> [B, X, Y] of the batch, where the model is: N dealt out to the latents in turn."""
        stacked = torch.cat([row[[i % len(row) for i in self.indices]] for row in rows])
        return stacked.repeat(self.repeats, 1, 1).to(self.device, self.dtype)

    def _mask(self, place: int, size: tuple[int, ...]) -> Tensor:
        """An application's mask times its weight before the curve, [B, P, 1]."""
        return self._deal([self._resized(place, cell.area, size) for cell in self.cells]) * self._weights[place]

    def _resized(self, place: int, area: tuple[int, ...] | None, size: tuple[int, ...]) -> Tensor:
        """Masks [M, P, 1], kept for the run's other calls."""
        key = (place, area, size)
        found = self.run.masks.get(key)
        if found is None:
            found = _mask_of(self._pictures[place], area, self.run.latent_size, size).flatten(1).unsqueeze(-1)
            if not torch.compiler.is_compiling():
                self.run.masks[key] = found
        return found


def _repeat(tensor: Tensor, times: list[int]) -> Tensor:
    rows = zip(tensor.chunk(len(times)), times, strict=True)
    return torch.cat([row.repeat(count, *[1] * (row.ndim - 1)) for row, count in rows])


def _mask_of(mask: Tensor, area: tuple[int, ...] | None, latent: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Masks [M, H, W] over the whole picture -> [M, *size], cut to the area of the latent that a row is sampled in.

    Averaged, not blended: an edge that lies between two latent pixels stays there."""
    if area is not None:
        height, width, top, left = area
        mask = interpolate(mask.unsqueeze(1), size=latent, mode="area").squeeze(1)
        mask = mask[:, top : top + height, left : left + width]
    return interpolate(mask.unsqueeze(1), size=size, mode="area").squeeze(1)
