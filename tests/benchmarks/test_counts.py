"""What the adapter adds to a step, in exact counts on a small UNet with SD1.5's 16 layers, and on a small SD3 with two:
CI notices a regression."""

from __future__ import annotations

import pytest
import torch

from benchmarks import counts, host

LEAST = {"small": 2 * 16, "sd3": 13 * 2}  # fewer: a layer does not act
OURS = ["", ", mask", ", start and end", ", mask, start and end"]


@pytest.fixture(scope="module", params=LEAST)
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def measured(size: str) -> dict[str, tuple[counts.Counts, counts.Counts]]:
    """{name: (counts, those of the bare host with as many rows)}."""
    host.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # counts do not depend on it, and threads of tiny operations wait for one another
    groups = counts.measure(size)
    torch.set_num_threads(threads)
    return {name: (c, next(iter(group.values()))) for group in groups.values() for name, c in group.items()}


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("guidance", ["simple", "three-way"])
def test_a_step_adds_an_attention_and_an_addition_a_layer_and_little_more(
    measured: dict[str, tuple[counts.Counts, counts.Counts]], size: str, guidance: str, variant: str
) -> None:
    ours, bare = measured[f"ours, {guidance}{variant}"]
    extra = ours.total - bare.total
    assert LEAST[size] <= extra <= counts.MOST_OPERATIONS[size], ours.operations - bare.operations
    assert (ours.model_calls, bare.model_calls) == (1, 1)


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("guidance", ["simple", "three-way"])
def test_a_step_reads_back_nothing_or_once_for_a_range(
    measured: dict[str, tuple[counts.Counts, counts.Counts]], guidance: str, variant: str
) -> None:
    ours, bare = measured[f"ours, {guidance}{variant}"]
    assert ours.read_backs - bare.read_backs <= (ours.model_calls if "start" in variant else 0)


REFERENCES = ["a reference", "a combined reference", "a negative reference"]


@pytest.mark.parametrize("which", REFERENCES)
def test_a_reference_costs_what_a_picture_does(
    measured: dict[str, tuple[counts.Counts, counts.Counts]], size: str, which: str
) -> None:
    """In a joint attention the shares of two references are put beside the picture's own keys: two more a layer."""
    (ours, bare), (picture, _) = measured[f"ours, {which}"], measured["ours, simple"]
    more = 2 * 2 if size == "sd3" and which == "a combined reference" else 0
    assert 0 <= ours.total - picture.total <= more, ours.operations - picture.operations
    assert ours.read_backs == bare.read_backs


@pytest.mark.parametrize("part", ["", ", start and end"])
def test_a_curve_costs_less_than_a_multiplication_a_layer_and_reads_nothing_back(
    measured: dict[str, tuple[counts.Counts, counts.Counts]], part: str
) -> None:
    ours, _ = measured[f"ours, a curve{part}"]
    without, _ = measured[f"ours, simple{part}"]
    assert 0 < ours.total - without.total <= counts.MOST_FOR_A_CURVE, ours.operations - without.operations
    assert ours.read_backs == without.read_backs


def test_the_counter_sees_read_backs_and_leaves_views_out() -> None:
    counter = counts.StepCounter()
    x = torch.ones(4, 4)
    with torch.no_grad(), counter:
        counter.on = True
        (x.view(16).unsqueeze(0).transpose(0, 1) * 2).sum().item()
    assert counter.counts.total == 3  # mul, sum, and the read-back
    assert counter.counts.read_backs == 1
