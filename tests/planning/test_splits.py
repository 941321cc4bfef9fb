"""The split of GPUs between roles: cases whose best split is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepgen.config import load_settings
from deepgen.planning.scale.phases import CallTime, Phases
from deepgen.planning.scale.splits import Load, Split, best_splits, reward_gpus

GROUPS = 64


def load(root: Path, sample_s: float, update_s: float, image_s: float, *more: str) -> Load:
    settings = load_settings(
        root / "stages" / "recipes" / "tiny-rl.yaml",
        [
            *(f"rewards.weights.{task}={{clip: 1.0}}" for task in ("t2i", "reasoning", "text", "edit")),
            f"rollout.prompts_per_step={GROUPS}",
            "rollout.group_size=4",
            "experience.max_staleness=1",
            "rewards.clip.gpus=1.0",
            *more,
        ],
    )
    scores = {"clip": CallTime(0.0, image_s)}
    return Load(settings, Phases(sample_s, 0, scores, update_s, 0, 0, 0, 0, 0, 0, 0, 0), {"clip": 1.0})


def test_gpus_go_to_the_roles_in_proportion_to_their_work(root: Path) -> None:
    """A group costs 4 GPU seconds of drawing, 2 of scoring and 2 of updating: of 64 GPUs 32, 16 and 16.

    Several versions behind, only the slowest role decides.
    """
    balanced = load(root, 4.0, 2.0, 0.5, "experience.max_staleness=3")
    best = best_splits(balanced, 64, [1, 2, 4, 8, 16, 32])[0]
    assert (best.workers, best.actors, best.replicas) == (16, 32, {"clip": 16})
    assert balanced.step_s(best) == pytest.approx(GROUPS * 8 / 64)


def test_no_split_is_better_than_the_best(root: Path) -> None:
    chosen = load(root, sample_s=3.0, update_s=5.0, image_s=0.3)
    counts = [1, 2, 4, 8, 16]
    found = chosen.step_s(best_splits(chosen, 20, counts)[0])
    everything = [
        chosen.step_s(Split(workers, actors, {"clip": 20 - workers - actors}))
        for workers in counts
        for actors in range(1, 19)
        if workers + actors < 20
    ]
    assert found <= min(everything) * 1.01


def test_gpus_that_do_not_help_stay_free(root: Path) -> None:
    """On-policy the eight groups of a step are drawn at once by eight actors; a ninth has nothing to do."""
    few = load(root, 4.0, 0.125, 0.0, "rollout.prompts_per_step=8", "experience.max_staleness=0")
    best = best_splits(few, 1000, [1, 2, 4, 8])[0]
    assert best.actors == 8 and best.gpus(few.settings) <= 17


def test_too_few_gpus(root: Path) -> None:
    assert best_splits(load(root, 1, 1, 1), 2, [1, 2]) == []
    assert best_splits(load(root, 1, 1, 1), 3, [1, 2])[0] == Split(1, 1, {"clip": 1})


def test_parts_of_gpus_lie_side_by_side(root: Path) -> None:
    shared = load(root, 1, 1, 1, "rewards.clip.gpus=0.25").settings
    assert [reward_gpus(shared, {"clip": count}) for count in (1, 4, 5)] == [1, 1, 2]
    assert reward_gpus(load(root, 1, 1, 1, "rewards.clip.gpus=2").settings, {"clip": 3}) == 6
