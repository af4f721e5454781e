"""What references mean when they are combined or kept away from: the miniature in the real host, judged by its oracle.

More pictures, and the figures in print: MEANING_CASES=100 pytest -rP tests/host/test_meaning_references.py
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import inside
import numpy as np
import pytest
import torch
from ipadapter_instruct_core.config import Base
from ipadapter_instruct_core.tasks import Task, defaults
from meaning import CASES, SEED
from small_world import SmallWorld, apply_adapter, encode_instruction, images, node
from training.miniature.judged.cases import Case, task_cases
from training.miniature.models.oracle import judge, labels
from training.miniature.world.captions import caption
from training.miniature.world.draw import draw
from training.miniature.world.factors import PERSON
from training.miniature.world.regions import FIRST_OF_SUBJECT

show_attention = importlib.import_module(f"{inside.PACK}.nodes.show_attention")
vision = importlib.import_module(f"{inside.PACK}.nodes.host.vision")
apply_module = importlib.import_module(f"{inside.PACK}.nodes.apply")
encode_reference, combine = node("encode_reference", "EncodeReference"), node("combine_references", "CombineReferences")

PAIRS = 3 * CASES // 2  # a mean and a negative show in some pictures alone
OPEN = ("style", "layout")  # what the prompts leave to the references
SHARED = {"weight_1": 1.0, "weight_2": 1.0}
BEARABLE = 0.75  # at full strength the picture's style wins over what keeps away from it in most pictures


def things(seed: int, count: int) -> list[Case]:
    found = task_cases(Task.STYLE, count, seed)
    return [case for case in found if PERSON not in (case.target.subject, case.condition.subject)]


@dataclass(frozen=True)
class Pairs:
    """Two held-out pictures a case, of different styles and layouts, and prompts that say neither."""

    world: SmallWorld
    cases: list[Case]
    others: list[Case]

    def reference(self, task: Task, second: bool = False) -> Any:
        instruction = encode_instruction(
            self.world.adapter, self.world.open_clip, task.value, "", "", prompt="", negative_prompt=""
        )
        pictures = images([case.picture for case in (self.others if second else self.cases)])
        return encode_reference(
            self.world.adapter, instruction, self.world.open_clip, pictures, "one for each batch item"
        )

    def applied(self, reference: Any, model: Any = None, strength: float = 1.0, **more: Any) -> Any:
        weight = strength / defaults(reference.task, Base.SD15).weight
        model = model or self.world.model
        return apply_adapter(model, self.world.adapter, reference=reference, weight=weight, guidance="simple", **more)

    def shares(self, model: Any) -> dict[str, float]:
        """Of the pictures, how many show the style and the layout of the first and of the second reference."""
        pictures = self.world.paint(self.cases, model=model, adapted=False)
        found = judge(self.world.oracle, pictures)
        result = {}
        for name, cases in (("first", self.cases), ("second", self.others)):
            shown = labels([case.condition for case in cases])
            result |= {f"{name} {what}": float((found[what] == shown[what]).float().mean()) for what in OPEN}
        print({name: round(share, 2) for name, share in result.items()})
        return result


@pytest.fixture(scope="module")
def pairs(miniature: SmallWorld) -> Iterator[Pairs]:
    with torch.inference_mode():
        cases = things(SEED, 3 * PAIRS)[:PAIRS]
        pool, others = things(SEED + 3, 8 * PAIRS), []
        for case in cases:
            unlike = (all(getattr(o.condition, part) != getattr(case.condition, part) for part in OPEN) for o in pool)
            others.append(pool.pop([*unlike].index(True)))
        cases = [replace(c, prompt=caption(c.target, np.random.default_rng(c.seed), OPEN)) for c in cases]
        yield Pairs(miniature, cases, others)


def check_the_mean(pairs: Pairs, **weights: float) -> None:
    one, other = pairs.reference(Task.STYLE), pairs.reference(Task.STYLE, second=True)
    mean = combine(method="mean", reference_1=one, reference_2=other, **weights)
    shares = pairs.shares(pairs.applied(mean))
    assert shares["first style"] + shares["second style"] >= 0.75, shares
    assert min(shares["first style"], shares["second style"]) >= 0.2, shares


def test_the_mean_of_two_styles_shows_one_or_the_other(pairs: Pairs) -> None:
    check_the_mean(pairs, **SHARED)


def test_a_mean_of_which_one_is_lost_is_found_out(pairs: Pairs) -> None:
    with pytest.raises(AssertionError, match="second style"):
        check_the_mean(pairs, weight_1=1.0, weight_2=0.0)


@pytest.fixture
def few(pairs: Pairs) -> Pairs:
    """Roles show in nearly every picture."""
    return replace(pairs, cases=pairs.cases[:CASES], others=pairs.others[:CASES])


@pytest.fixture(scope="module")
def without(pairs: Pairs) -> dict[str, float]:
    """The prompts leave the style open, and the reference gives everything: without a negative, its style too."""
    return pairs.shares(pairs.applied(pairs.reference(Task.EVERYTHING), strength=BEARABLE))


def check_a_negative(pairs: Pairs, without: dict[str, float]) -> None:
    everything, style = pairs.reference(Task.EVERYTHING), pairs.reference(Task.STYLE)
    beside = pairs.shares(pairs.applied(everything, negative_reference=style, strength=BEARABLE))
    assert without["first style"] - beside["first style"] >= 0.1, (without, beside)
    assert beside["first layout"] >= 0.6, "what was not said to keep away from stays"


def test_a_negative_style_lowers_its_share(pairs: Pairs, without: dict[str, float]) -> None:
    check_a_negative(pairs, without)


def test_an_ignored_negative_is_found_out(
    pairs: Pairs, without: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of = apply_module.rows_of
    monkeypatch.setattr(apply_module, "rows_of", lambda reference, negative=None: rows_of(reference))
    with pytest.raises(AssertionError, match="first style"):
        check_a_negative(pairs, without)


def check_two_roles(shares: dict[str, float]) -> None:
    assert shares["first style"] >= 0.6 and shares["second layout"] >= 0.6, shares
    assert shares["second style"] <= 0.25 and shares["first layout"] <= 0.4, shares


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("way", ["chain", "side by side"])
def test_the_style_of_one_and_the_layout_of_the_other(few: Pairs, way: str, swapped: bool) -> None:
    roles = [few.reference(Task.STYLE), few.reference(Task.COMPOSITION, second=True)]
    one, other = reversed(roles) if swapped else roles
    if way == "chain":
        model = few.applied(other, model=few.applied(one))
    else:
        model = few.applied(combine(method=way, reference_1=one, reference_2=other, **SHARED), strength=1.5)
    check_two_roles(few.shares(model))


def test_roles_that_are_confused_are_found_out(few: Pairs) -> None:
    style, layout = few.reference(Task.STYLE, second=True), few.reference(Task.COMPOSITION)
    both = combine(method="side by side", reference_1=style, reference_2=layout, **SHARED)
    with pytest.raises(AssertionError, match="first style"):
        check_two_roles(few.shares(few.applied(both, strength=1.5)))


def test_where_it_looked_in_the_object_box(pairs: Pairs) -> None:
    """The figure of the help page, on 200 held-out pictures; what it holds is that the two instructions differ."""
    cases = things(7, 400)[:200]
    tokens = vision.image_tokens(
        pairs.world.open_clip, images([case.picture for case in cases]), pairs.world.adapter.config
    )[0]
    found = {}
    for task in (Task.OBJECT, Task.STYLE):
        instruction = encode_instruction(
            pairs.world.adapter, pairs.world.open_clip, task.value, "", "", prompt="", negative_prompt=""
        )
        maps = show_attention.looked_at(pairs.world.adapter, instruction, tokens, False)
        boxes = torch.stack([box_share(draw(case.condition) >= FIRST_OF_SUBJECT, maps.shape[1]) for case in cases])
        torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(len(cases)))
        found[task] = (maps * boxes).sum(dim=(1, 2))
        print(task.value, f"{float(found[task].mean()):.3f} of the attention in {float(boxes.mean()):.3f} of the area")
    assert (found[Task.OBJECT] - found[Task.STYLE]).abs().mean() > 0.001


def box_share(subject: np.ndarray, side: int) -> torch.Tensor:
    """[side, side]: how much of each patch lies in the box of what is marked."""
    rows, columns = np.nonzero(subject)
    box = torch.zeros(subject.shape)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1.0
    return torch.nn.functional.adaptive_avg_pool2d(box[None], side)[0]
