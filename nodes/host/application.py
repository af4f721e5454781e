"""One use of an adapter on a MODEL, and the chain of them: immutable, so cached MODELs can share them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...ipadapter_instruct_core.curves import Curve
from ...ipadapter_instruct_core.guidance import Row
from .memory import HostedAdapter

CHAIN = "ipadapter_instruct"  # where a MODEL's transformer options keep the chain


@dataclass(frozen=True)
class ThreeWay:
    """Scales of three-way guidance; the text scale is the sampler's cfg.

    Attributes:
        automatic: the task has chosen, not the user. At cfg 1, which models take that were made to run without a
            negative, it then is simple guidance.
    """

    instruct_scale: float
    image_scale: float
    automatic: bool = False


@dataclass(frozen=True, eq=False)
class Application:
    """What one Apply node asked for.

    Attributes:
        tokens: adapter tokens [N, T, O] of each row; N is 1, or the number of pictures where each belongs
            to one latent of the batch.
        weight: the strength itself, the task's default already multiplied in.
        start_percent, end_percent: the part of sampling it acts in, 0-1.
        three_way: its scales, or None for simple guidance.
        mask: [M, H, W] in 0-1, or None.
        bias: [1, 1, T] of each row, added to the attention's logits; None where no token is preferred.
        curve: the weight's course over the part of sampling that it acts in.
    """

    adapter: HostedAdapter
    tokens: Mapping[Row, Tensor]
    weight: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    three_way: ThreeWay | None = None
    mask: Tensor | None = None
    bias: Mapping[Row, Tensor] | None = None
    curve: Curve = Curve.CONSTANT

    @property
    def always(self) -> bool:
        return self.start_percent <= 0.0 and self.end_percent >= 1.0

    def __deepcopy__(self, memo: dict) -> "Application":
        return self


@dataclass(frozen=True, eq=False)
class Chain:
    """All applications on a MODEL, in order; ``guider_scales`` are those that our guider sets for all."""

    applications: tuple[Application, ...] = ()
    guider_scales: ThreeWay | None = None

    def extended(self, application: Application) -> "Chain":
        return replace(self, applications=(*self.applications, application))

    def scales_of(self, application: Application) -> ThreeWay | None:
        if self.guider_scales is not None and application.adapter.config.follows_instructions:
            return self.guider_scales
        return application.three_way

    def scales(self, active: frozenset[Application]) -> ThreeWay | None:
        """The scales in force: those of the last active application that is guided three ways."""
        asked = [self.scales_of(a) for a in self.applications if a in active]
        return next((scales for scales in reversed(asked) if scales is not None), None)

    def row(self, application: Application, row: Row) -> Row:
        """The row of an application's tokens that a row of the sampler sees.

        In another application's three-way rows, one in simple guidance takes part with what leaves it
        the text scale: its picture in the "everything" row, none in the "image" row.
        """
        if self.scales_of(application) is None:
            return {Row.EVERYTHING: Row.FULL, Row.IMAGE: Row.UNCOND}.get(row, row)
        return row

    @property
    def may_be_three_way(self) -> bool:
        return any(self.scales_of(a) is not None for a in self.applications)

    @property
    def needs_negative(self) -> bool:
        """At cfg 1 too, where the host leaves it out."""
        return any(scales is not None and not scales.automatic for scales in map(self.scales_of, self.applications))

    def __deepcopy__(self, memo: dict) -> "Chain":
        return self
