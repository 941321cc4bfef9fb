"""Advantages of a step's groups, and how far apart the images of a group are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.experience.step_advantages import own_advantages, step_advantages
from actors.experience.step_metrics import group_diversity, step_metrics
from actors.messages import Group
from deepgen.config import load_settings
from deepgen.data.records import Record


def scored(number: int, scores: np.ndarray) -> Group:
    record = Record(f"p-{number}", "t2i", "a thing", "", None, (), "")
    weights = np.ones(scores.shape[1], np.float32)
    return replace(Group(number, 0, 0, record, 0), scores=scores.astype(np.float32), reward_weights=weights)


def test_a_missing_score_is_counted_and_leaves_all_advantages_finite() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 4, 2))
    scores[1, 2, 1] = np.nan
    groups = [scored(number, rows) for number, rows in enumerate(scores)]
    settings = load_settings(None, ["train.workers=1"])
    whole = step_advantages(settings, groups)
    assert np.isfinite(whole.advantages.numpy()).all()
    assert np.isfinite(own_advantages(settings, groups[1])).all()
    metrics, tally = step_metrics(groups, np.ones((2, 2)), ["a", "b"], whole)
    assert metrics["reward_missing_share/b"] == 1 / 8 and tally["b"][:2] == (7, 1)
    assert metrics["advantage/share/a"] + metrics["advantage/share/b"] == pytest.approx(1)
    assert metrics["reward_spread/b"] == pytest.approx(
        (scores[0, :, 1].std(ddof=1) + scores[1, [0, 1, 3], 1].std(ddof=1)) / 2
    )
    assert metrics["reward_weight/a"] == 1


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    images = np.zeros((3, 2, 4, 4), np.float32)
    assert group_diversity(images) == 0
    images[2] += 3
    assert group_diversity(images) == pytest.approx(2)  # pairs are 0, 3 and 3 apart
    assert group_diversity(images[:1]) is None
    groups = [replace(scored(n, np.ones((3, 1))), diversity=value) for n, value in enumerate((0.5, 1.5, None))]
    assert diversity_of(groups) == 1
    assert diversity_of(groups[2:]) is None


def diversity_of(groups: list[Group]) -> float | None:
    """What a step of these groups logs."""
    settings = load_settings(None, ["train.workers=1"])
    metrics, _ = step_metrics(groups, np.ones((len(groups), 1)), ["a"], step_advantages(settings, groups))
    return metrics.get("rollout/diversity")
