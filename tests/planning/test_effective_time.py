"""Effective training time: the simulation against the arithmetic, and Young's interval."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from deepgen.planning.scale.effective_time import (
    DAY_S,
    Losses,
    checkpoint_interval,
    expected_share,
    longest_restart,
    simulated_share,
)

# 16 learner nodes of which a tenth dies a day.
LOSSES = Losses(10.0, 2.0, 5.0, 120.0, learner_rate=0.1 * 16 / DAY_S)


def test_without_failures_only_checkpoints_cost() -> None:
    healthy = replace(LOSSES, learner_rate=0.0)
    assert simulated_share(healthy, 10, 100, seed=0) == pytest.approx(1000 / (1000 + 9 * 2))  # none after the last step
    assert simulated_share(replace(healthy, checkpoint_s=0.0), 10, 100, seed=0) == 1.0
    assert checkpoint_interval(healthy, 1500) == 1500


def test_the_interval_is_youngs() -> None:
    every = checkpoint_interval(LOSSES, 10_000)
    assert every == round(math.sqrt(2 * 2.0 / LOSSES.learner_rate) / 10.0) == 46
    best = expected_share(LOSSES, every)
    assert all(expected_share(LOSSES, other) < best for other in (every // 2, 2 * every))
    assert checkpoint_interval(LOSSES, 20) == 20
    assert checkpoint_interval(replace(LOSSES, write_s=990.0), 10_000) == 99  # no checkpoint waits for the one before
    assert checkpoint_interval(replace(LOSSES, checkpoint_s=0.0, write_s=0.0), 10_000) == 1


@pytest.mark.parametrize("every", [5, 46, 200])
def test_deaths_cost_what_the_arithmetic_says(every: int) -> None:
    losses = replace(LOSSES, others=((0.1 * 50 / DAY_S, 30.0),))
    found = simulated_share(losses, every, 5000, seed=1)
    assert found == pytest.approx(expected_share(losses, every), abs=0.005)


def test_the_longest_restart_that_reaches_a_goal() -> None:
    longest = longest_restart(LOSSES, 46, 0.98)
    assert expected_share(replace(LOSSES, restart_s=longest), 46) == pytest.approx(0.98)
    assert longest_restart(LOSSES, 46, 0.9999) < 0
    assert longest_restart(replace(LOSSES, learner_rate=0.0), 46, 0.98) == math.inf


def test_other_roles_alone() -> None:
    losses = replace(LOSSES, checkpoint_s=0.0, learner_rate=0.0, others=((1 / 1000, 50.0),))
    assert simulated_share(losses, 10, 50_000, seed=2) == pytest.approx(1 / 1.05, abs=0.005)


def test_a_seed_decides() -> None:
    first, again, other = (simulated_share(LOSSES, 46, 1000, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_who_dies_before_the_first_checkpoint_gets_nowhere() -> None:
    assert simulated_share(replace(LOSSES, learner_rate=1.0), 46, 100, seed=0) == 0.0
