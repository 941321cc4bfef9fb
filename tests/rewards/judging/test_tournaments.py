"""Tournaments: who meets whom, and scores of what is there."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rewards.judging.tournaments import TOURNAMENTS, mean_wins, pairs
from tests.helpers.noisy_judges import agreement, scores


def partners(found: list[tuple[int, int]]) -> Counter[int]:
    return Counter(image for pair in found for image in pair)


@pytest.mark.parametrize("size", range(1, 12))
def test_full_is_every_pair_once(size: int) -> None:
    found = pairs(size, "full", seed=size)
    assert len(found) == size * (size - 1) // 2
    assert len({frozenset(pair) for pair in found}) == len(found)
    assert all(first != second for first, second in found)


@pytest.mark.parametrize("size", range(3, 12))
def test_a_ring_is_one_circle(size: int) -> None:
    found = pairs(size, "ring", seed=3)
    assert len(found) == size and set(partners(found).values()) == {2}
    reached, following = {0}, dict(found)
    place = following[0]
    while place not in reached:
        reached.add(place)
        place = following[place]
    assert len(reached) == size


@pytest.mark.parametrize("size", range(2, 12))
@pytest.mark.parametrize("wanted", range(1, 12))
def test_random_partners_are_as_many_as_wanted(size: int, wanted: int) -> None:
    found = pairs(size, "random", wanted, seed=wanted)
    assert len({frozenset(pair) for pair in found}) == len(found)
    expected = min(wanted + (size % 2 and wanted % 2), size - 1)
    assert set(partners(found).values()) == {expected}


def test_the_seed_decides_and_small_groups_work() -> None:
    assert pairs(8, "random", 4, seed=1) == pairs(8, "random", 4, seed=1) != pairs(8, "random", 4, seed=2)
    assert pairs(8, "ring", seed=1) != pairs(8, "ring", seed=2)
    assert len(pairs(2, "ring")) == len(pairs(2, "random", 4)) == 1
    assert pairs(1, "full") == pairs(1, "ring") == pairs(0, "full") == []
    with pytest.raises(ValueError, match="tournament 'swiss'; allowed: full, ring, random"):
        pairs(8, "swiss")


def test_scores_are_shares_of_the_comparisons_that_happened() -> None:
    results = [(0, 1, 1.0), (1, 2, 0.5), (2, 0, 0.25)]
    assert mean_wins(3, results) == pytest.approx([(1 + 0.75) / 2, (0 + 0.5) / 2, (0.5 + 0.25) / 2])
    assert mean_wins(3, results[:1]) == [1.0, 0.0, None]  # not half a win for image 2
    assert mean_wins(2, []) == [None, None]


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("kind", TOURNAMENTS)
def test_a_judge_that_sees_only_positions_tells_no_image_from_another(size: int, kind: str) -> None:
    always_first = np.ones((size, size))
    found = pairs(size, kind, seed=5)
    assert set(scores(found, always_first, both=True)) == {0.5}
    one_order = scores(found, always_first, both=False)
    # An odd number of partners leaves each image one place out of balance.
    assert np.abs(one_order - 0.5).max() <= 0.5 / min(partners(found).values()) + 1e-9


def test_what_fewer_comparisons_cost() -> None:
    """The order of the rows of docs/judges.md."""
    biased = agreement("noisy, prefers the first", 150)
    with_quality = {name: row[2] for name, row in biased.items()}
    assert [row[0] for row in biased.values()] == [56, 28, 48, 32, 16, 16, 8, 28]
    assert with_quality["full"] > with_quality["random, 4 partners"] > with_quality["ring"]
    assert with_quality["full, one order"] > with_quality["full, lower index first"] + 0.05
    assert biased["full"][1] == pytest.approx(1.0)
    assert biased["ring"][1] < 0.8 < biased["random, 4 partners"][1]
