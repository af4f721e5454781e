"""Exact counts of one more model step over the bare host: ATen operations without views, and among them scalar
read-backs from the device, each of which makes the processor wait for the graphics card."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import host, popular
from .report import Result, parser, table, write

# Eight above the floor: of UNets an attention and an addition a layer, 32; of the small SD3 thirteen for each of two
# layers, 26: four projections and a view of each, an attention, an addition, three that put tensors side by side.
MOST_OPERATIONS = {"small": 40, "real": 40, "sd3": 34}
MOST_FOR_A_CURVE = 16  # of what it adds: one a layer of UNets
LATENT = 8
STEPS, MEASURED = 4, 2  # the steps before fill what is kept for the run
PART = {"start": 0.1, "end": 0.9}  # of sampling; the steps 1 and 2 of 4 lie within
READ_BACK = torch.ops.aten._local_scalar_dense.default


@dataclass
class Counts:
    """What one step did."""

    operations: Counter[str]
    read_backs: int
    model_calls: int

    @property
    def total(self) -> int:
        return sum(self.operations.values())


class StepCounter(TorchDispatchMode):
    """Counts while it is ``on``."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.counts = Counts(Counter(), 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.on and not func.is_view:
            self.counts.operations[str(func)] += 1
            self.counts.read_backs += func is READ_BACK
        return func(*args, **(kwargs or {}))

    def at_step(self, step: int) -> None:
        """Told when the model has been evaluated: what lies between two such calls is one whole step."""
        self.on = step == MEASURED - 1

    def at_model_call(self, *_: Any) -> None:
        self.counts.model_calls += self.on


def count(model: Any) -> Counts:
    """The counts of one step of a MODEL, once it is warm."""
    counter = StepCounter()
    hook = model.model.diffusion_model.register_forward_pre_hook(counter.at_model_call)
    try:
        # Not inference mode, in which operations made of others are seen as one, `item` among them.
        with torch.no_grad(), counter:
            result = host.sample(model, LATENT, STEPS, counter.at_step)
    finally:
        hook.remove()
    assert result.isfinite().all(), "the sample is not finite"
    return counter.counts


def variants(settings: dict[str, Any], start: str, end: str) -> dict[str, dict[str, Any]]:
    """A way to apply an adapter alone, with a mask, over a part of sampling, and with both."""
    mask, part = {"mask": host.half_mask()}, {start: PART["start"], end: PART["end"]}
    return {
        "": settings,
        ", mask": settings | mask,
        ", start and end": settings | part,
        ", mask, start and end": settings | mask | part,
    }


def measure(size: str) -> dict[str, dict[str, Counts]]:
    """{baseline: {name: counts}}, the baseline's own counts first."""
    model = host.sd3() if size == "sd3" else host.unet(size)
    ours = host.Ours(model)
    part = ("start_percent", "end_percent")
    two = {"bare host, 2 rows": count(model)}
    two |= {f"ours, simple{name}": count(ours.apply(**s)) for name, s in variants({}, *part).items()}
    two |= {f"ours, {name}": count(ours.apply_reference(**given)) for name, given in ours.references().items()}
    two |= {"ours, a curve": count(ours.apply(weight_curve="ease in"))}
    two |= {
        "ours, a curve, start and end": count(ours.apply(weight_curve="ease in", start_percent=0.1, end_percent=0.9))
    }
    if popular.FOLDER and size != "sd3":
        other = popular.Popular(model, [width for _, width in ours.adapter.config.layers])
        theirs = variants({}, "start_at", "end_at")
        two |= {f"{popular.NAME}{name}": count(other.apply(**s)) for name, s in theirs.items()}
    four = {"bare host, 4 rows": count(host.with_rows(model, 2))}
    ways = variants(host.THREE_WAY, *part)
    four |= {f"ours, three-way{name}": count(ours.apply(**s)) for name, s in ways.items()}
    return {"two": two, "four": four}


def results(size: str, groups: dict[str, dict[str, Counts]]) -> list[Result]:
    found = []
    for group in groups.values():
        bare = next(iter(group.values()))
        for name, counts in group.items():
            if counts is bare:
                found.append(Result(f"counts, {size}: {name}: operations", bare.total, ""))
                found.append(Result(f"counts, {size}: {name}: read-backs", bare.read_backs, ""))
                continue
            ours = name.startswith("ours")
            most = MOST_OPERATIONS[size] + (MOST_FOR_A_CURVE if "curve" in name else 0) if ours else None
            reads = (counts.model_calls if "start" in name else 0) if ours else None
            found += [
                Result(f"counts, {size}: {name}: operations over bare", counts.total - bare.total, "", most),
                Result(f"counts, {size}: {name}: read-backs over bare", counts.read_backs - bare.read_backs, "", reads),
            ]
    return found


def show(size: str, groups: dict[str, dict[str, Counts]], listed: bool) -> None:
    rows = []
    for group in groups.values():
        bare = next(iter(group.values()))
        for name, counts in group.items():
            operations, reads = counts.total - bare.total, counts.read_backs - bare.read_backs
            over = ["", ""] if counts is bare else [f"{operations:+d}", f"{reads:+d}"]
            rows.append([name, str(counts.total), over[0], str(counts.read_backs), over[1], str(counts.model_calls)])
            if listed and counts is not bare:
                extra = counts.operations - bare.operations
                rows += [[f"    {operation}", "", f"{n:+d}", "", "", ""] for operation, n in extra.most_common()]
                fewer = bare.operations - counts.operations
                rows += [[f"    {operation}", "", f"{-n:+d}", "", "", ""] for operation, n in fewer.most_common()]
    header = ["", "operations", "over bare", "read-backs", "over bare", "model calls"]
    what = "SD3, 2 of 4 blocks" if size == "sd3" else f"SD1.5's 16 layers, {size} dimensions"
    table(f"Counts of one step, {what}, latents {LATENT}x{LATENT}", header, rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=MOST_OPERATIONS, help="only this one")
    options.add_argument(
        "--list", action="store_true", help="also name the operations that are more than the bare host's"
    )
    chosen = options.parse_args()
    host.start()
    found = []
    for size in [chosen.size] if chosen.size else MOST_OPERATIONS:
        groups = measure(size)
        show(size, groups, chosen.list)
        found += results(size, groups)
    missed = [result for result in found if result.ok is False]
    print("".join(f"\n  MISSED {r.name}: {r.value:g}, at most {r.target:g}" for r in missed) or "\n  every target met")
    write(found, chosen.json)


if __name__ == "__main__":
    main()
