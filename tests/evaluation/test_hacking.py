"""The test for hacked rewards: early where it should be, and quiet where nothing is hacked."""

from __future__ import annotations

import numpy as np

from deepgen.config.schema.sections import ALARMS, HACKING_PROMPTS
from deepgen.evaluation.hacking import HackingTest, chance_of_fall, paired_difference, prompt_means
from deepgen.tracking.alarms import CHANCE, GOOD_STEP

PROMPTS, LOOKS = 64, 20
WEIGHTS = np.tile([1.0, 0.0], (PROMPTS, 1)), np.tile([0.0, 1.0], (PROMPTS, 1))  # of training, of holding out


def chances(held_out: list[float], seed: int, trained: list[float] | None = None) -> tuple[list[float], int]:
    """Of each look at a run whose rewards have these true means, and the good step in the end.

    Prompts differ by 0.3, and each answers to a change of the policy in its own way.
    """
    rng = np.random.default_rng(seed)
    prompts = rng.normal(0, 0.3, (PROMPTS, 2))
    test, found, walk = HackingTest(LOOKS), list[float](), np.zeros((PROMPTS, 2))
    for step, means in enumerate(zip(trained or np.linspace(0, 1, len(held_out)), held_out, strict=True)):
        walk += rng.normal(0, 0.03, walk.shape) if step else 0.0
        metrics = test.compare(step, np.array(means) + prompts + walk, *WEIGHTS)
        found += [metrics[CHANCE]] if step else []
    return found, int(metrics[GOOD_STEP])


def test_the_alarm_comes_before_the_fall_is_large() -> None:
    """The held-out reward falls from 1 by 1 % a step."""
    falling = [1 - 0.01 * step for step in range(LOOKS + 1)]
    first = [next(n for n, chance in enumerate(chances(falling, seed)[0], 1) if chance < 0.05) for seed in range(20)]
    assert sum(step < 5 for step in first) >= 18  # of 20 before 5 % are gone


def test_honest_runs_are_left_alone() -> None:
    limit = ALARMS["hacking"]
    steady = [min(chances([1.0] * (LOOKS + 1), seed)[0]) < limit for seed in range(100)]
    assert sum(steady) <= 5  # 5 %
    assert not any(min(chances(np.linspace(0.5, 1, LOOKS + 1).tolist(), seed)[0]) < limit for seed in range(20))


def test_a_fall_without_a_rise_is_not_hacking() -> None:
    falling = [1 - 0.01 * step for step in range(LOOKS + 1)]
    assert min(chances(falling, 0, [0.0] * len(falling))[0]) > 0.05
    assert min(chances(falling, 0, falling)[0]) == 1.0


def test_a_late_fall_is_compared_with_the_best_evaluation() -> None:
    rising = np.linspace(1, 1.5, 11).tolist()
    found, good = chances([*rising, *(1.5 - 0.03 * n for n in range(1, 11))], 0)
    assert min(found[:10]) == 1.0
    assert min(found[10:15]) < 0.05  # above its start all the time
    assert abs(good - 10) <= 1


def test_scales_do_not_count() -> None:
    rng = np.random.default_rng(0)
    before, change = rng.normal(0, 1, (PROMPTS, 3)), rng.normal([0.5, -0.2, -0.2], 0.4, (PROMPTS, 3))
    trained, held_out = np.tile([1.0, 0, 0], (PROMPTS, 1)), np.tile([0, 1.0, 2.0], (PROMPTS, 1))

    def chance(scale: np.ndarray) -> float:
        test = HackingTest(1)
        test.compare(0, before * scale, trained, held_out)
        return test.compare(1, (before + change) * scale, trained, held_out)[CHANCE]

    assert chance(np.ones(3)) < 1e-3
    assert np.isclose(chance(np.array([1e-3, 1.0, 1e4])), chance(np.ones(3)))


def test_missing_scores_make_no_difference() -> None:
    before, after = (
        np.array([[1.0, 2.0], [1.0, np.nan], [np.nan, np.nan]]),
        np.array([[0.5, 2.0], [2.0, 0.0], [1.0, 1.0]]),
    )
    assert np.array_equal(paired_difference(before, after, np.ones((3, 2))), [-0.25, 1.0, np.nan], equal_nan=True)
    means = prompt_means(np.array([[[1.0], [np.nan]], [[np.nan], [np.nan]]]))
    assert np.array_equal(means, np.array([[1.0], [np.nan]]), equal_nan=True)
    few = np.full(HACKING_PROMPTS - 1, -1.0)
    assert chance_of_fall(few) == 1.0 and chance_of_fall(np.append(few, -1.0)) == 0.0
