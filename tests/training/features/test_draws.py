"""What a slot is given depends on seed, step and position alone, in the shares that were asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch
from ipadapter_instruct_core.tasks import Task
from pydantic import ValidationError
from training.features.draws import Draw, Draws, Dropout, Dropped
from training.train.batches import Slots

SAMPLES = {Task.STYLE: [5, 6, 7, 8], Task.FACE: list(range(100, 200)), Task.OBJECT: [3]}
WEIGHTS = {Task.FACE: 3.0, Task.STYLE: 1.0, Task.OBJECT: 0.0}
DROPOUT = Dropout(text=0.05, words=0.1, image=0.15, all=0.2)
COUNT = 20_000


def made(seed: int = 0, dropout: Dropout = DROPOUT) -> Draws:
    return Draws(seed, SAMPLES, WEIGHTS, dropout)


@pytest.fixture(scope="module")
def many() -> dict[tuple[int, int], Draw]:
    """Draws of consecutive slots, as a run takes them."""
    draws = made()
    return {slot: draws.draw(*slot) for slot in product(range(1, COUNT // 8 + 1), range(8))}


def assert_share(found: int, total: int, share: float) -> None:
    """Within five deviations of a binomial."""
    assert abs(found - share * total) < 5 * (total * share * (1 - share)) ** 0.5


def test_a_draw_is_a_function_of_seed_step_and_position(many: dict[tuple[int, int], Draw]) -> None:
    again = made()
    for slot in [(2500, 7), (1, 0), (17, 3)]:  # in another order, alone
        assert again.draw(*slot) == many[slot]
    assert made(seed=1).draw(1, 0) != many[1, 0]
    assert again.draw(1, 0, attempt=1) != many[1, 0]
    assert len(set(many.values())) == len({draw.noise_seed for draw in many.values()}) == COUNT


def test_tasks_come_in_the_shares_of_their_weights(many: dict[tuple[int, int], Draw]) -> None:
    found = Counter(draw.task for draw in many.values())
    assert found.keys() == {Task.FACE, Task.STYLE}
    assert_share(found[Task.FACE], COUNT, 0.75)


def test_each_sample_of_a_task_comes_as_often(many: dict[tuple[int, int], Draw]) -> None:
    for task, count in ((Task.STYLE, 4), (Task.FACE, 100)):
        found = Counter(draw.sample for draw in many.values() if draw.task is task)
        assert sorted(found) == SAMPLES[task]
        for number in found.values():
            assert_share(number, found.total(), 1 / count)


def test_conditions_are_dropped_in_their_shares(many: dict[tuple[int, int], Draw]) -> None:
    found = Counter(draw.dropped for draw in many.values())
    shares = {Dropped.TEXT: 0.05, Dropped.WORDS: 0.1, Dropped.IMAGE: 0.15, Dropped.ALL: 0.2, Dropped.NOTHING: 0.5}
    for dropped, share in shares.items():
        assert_share(found[dropped], COUNT, share)


def test_by_default_each_kind_is_dropped_as_ip_adapter_does() -> None:
    draws = made(dropout=Dropout())
    found = Counter(draws.draw(step, 0).dropped for step in range(4000))
    for dropped in (Dropped.TEXT, Dropped.WORDS, Dropped.IMAGE, Dropped.ALL):
        assert_share(found[dropped], 4000, 0.05)


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        pytest.param(lambda draw: draw.timestep, 1000, id="timesteps"),
        pytest.param(lambda draw: draw.instruction, 1.0, id="instructions"),
    ],
)
def test_numbers_are_spread_evenly(
    many: dict[tuple[int, int], Draw], value: Callable[[Draw], float], whole: float
) -> None:
    values = np.array([value(draw) for draw in many.values()])
    assert values.min() >= 0 and values.max() < whole
    counts, _ = np.histogram(values, bins=20, range=(0, whole))
    expected = COUNT / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4


def parts(draws: Iterator[Draw]) -> np.ndarray:
    """Everything random of draws, each as a number in 0..1: [number of draws, 6]."""
    kinds = list(Dropped)
    return np.array(
        [
            (
                d.task is Task.FACE,
                (SAMPLES[d.task].index(d.sample) + 0.5) / len(SAMPLES[d.task]),
                d.instruction,
                kinds.index(d.dropped) / 5,
                d.timestep / 1000,
                d.noise_seed / 2**63,
            )
            for d in draws
        ]
    )


@pytest.mark.parametrize("step_apart, place_apart", [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (1, -1)])
def test_nothing_random_tells_of_anything_else(
    many: dict[tuple[int, int], Draw], step_apart: int, place_apart: int
) -> None:
    """Neither within a slot nor between neighbours in time and place."""
    pairs = [((s, p), (s + step_apart, p + place_apart)) for s, p in many]
    pairs = [(a, b) for a, b in pairs if b in many]
    first, second = (parts(many[slot] for slot in slots) for slots in zip(*pairs, strict=True))
    correlations = np.corrcoef(first.T, second.T)[:6, 6:]
    if (step_apart, place_apart) == (0, 0):
        correlations = correlations[~np.eye(6, dtype=bool)]
    assert np.abs(correlations).max() < 5 / len(pairs) ** 0.5


def test_noise_is_the_slots_own() -> None:
    draws, shape = made(), (4, 16, 16)
    latent, added = draws.draw(3, 1).noise(shape)
    again = draws.draw(3, 1).noise(shape)
    assert torch.equal(latent, again[0]) and torch.equal(added, again[1])
    others = [draws.draw(*slot).noise(shape) for slot in ((3, 2), (4, 1), (1, 3))]
    noises = torch.stack([latent, added, *(noise for pair in others for noise in pair)]).flatten(1)
    correlations = torch.corrcoef(noises)
    assert (correlations - torch.eye(len(noises))).abs().max() < 0.16  # 5 deviations of 1024 white values
    assert abs(float(noises.mean())) < 0.06 and abs(float(noises.std()) - 1) < 0.05


def test_shares_of_dropout_above_one_are_refused() -> None:
    with pytest.raises(ValueError, match="^The shares of dropout add up to more than 1; lower them.$"):
        made(dropout=Dropout(text=0.3, words=0.3, image=0.3, all=0.2))
    everything_dropped = made(dropout=Dropout(text=0.1, words=0.2, image=0.3, all=0.4))
    assert all(everything_dropped.draw(step, 0).dropped is not Dropped.NOTHING for step in range(200))
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Dropout(text=-0.1)


def test_weights_that_choose_no_task_are_refused() -> None:
    with pytest.raises(ValueError, match="^No task has a weight above 0 in `tasks`; give at least one.$"):
        Draws(0, SAMPLES, {Task.FACE: 0.0}, DROPOUT)


def test_a_task_alone_is_drawn_always() -> None:
    draws = Draws(0, SAMPLES, {Task.OBJECT: 0.1}, DROPOUT)
    assert {(draws.draw(step, 0).task, draws.draw(step, 0).sample) for step in range(50)} == {(Task.OBJECT, 3)}


@pytest.mark.parametrize("world, accumulation", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_every_slot_is_taken_once_by_some_rank(world: int, accumulation: int) -> None:
    ranks = [list(Slots(3, 5, 8, accumulation, rank, world)) for rank in range(world)]
    assert all(len(batches) == len(Slots(3, 5, 8, accumulation, 0, world)) == 2 * accumulation for batches in ranks)
    # The ranks' micro-batches of one moment are next to one another, and a step's come before the next one's.
    joined = [slot for moment in zip(*ranks, strict=True) for part in moment for slot in part]
    assert joined == [(step, position) for step in (3, 4) for position in range(8)]
