"""A sample of `make soak`: one seed under different timings ends with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from actors.experience.stream import version_of
from deepgen.config import Settings
from deepgen.data.parquet import read_records
from soak.__main__ import odd_ones, row
from soak.schedules import Outcome, Schedule, run_schedule, start_actors
from tests.helpers.rl_world import make_settings, make_world

TASKS = ("t2i", "reasoning", "text", "edit")


def settings_of(world: Path, max_staleness: int, schedule: Schedule) -> Settings:
    return make_settings(
        world,
        f"experience.max_staleness={max_staleness}",
        "rewards.delayed.class=soak.schedules:DelayedBrightness",
        f"rewards.delayed.delay_s={schedule.longest_s}",
        f"rewards.delayed.delay_seed={schedule.seed}",
        "train.steps=3",
        *(f"rewards.weights.{task}={{delayed: 1.0}}" for task in TASKS),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def actors(ray_local: ModuleType, world: Path) -> Iterator[dict[str, Any]]:
    started = start_actors(settings_of(world, 0, Schedule(0, 1, 0.0)), 2)
    yield started
    for actor in started.values():
        ray_local.kill(actor)


@pytest.mark.ray
def test_timing_decides_nothing(world: Path, actors: dict[str, Any]) -> None:
    outcomes, max_staleness = [], 1
    for schedule in [Schedule(0, 1, 0.0), Schedule(1, 2, 0.1)]:
        settings = settings_of(world, max_staleness, schedule)
        outcomes.append(run_schedule(settings, read_records(settings.data.prompts), actors, schedule))
    assert outcomes[0].versions == tuple(version_of(step, max_staleness) for step in range(3))
    assert odd_ones(outcomes) == 0


def test_versions_are_a_function_of_the_step() -> None:
    assert [version_of(step, 0) for step in range(4)] == [0, 1, 2, 3]
    assert [version_of(step, 2) for step in range(5)] == [0, 0, 0, 1, 2]


def test_a_difference_would_be_counted() -> None:
    same, other = Outcome("a", (0, 0), 1.0), Outcome("b", (0, 0), 2.0)
    assert odd_ones([same, same, other, Outcome("a", (0, 1), 1.0)]) == 2
    schedules = [Schedule(0, 1, 0.0), Schedule(1, 2, 0.1)]
    assert row(1, schedules, [same, other]) == "| 1 | 2 | 1 to 2 | 2 | 1 | 0, 0 |"
