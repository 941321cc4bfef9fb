"""A dozen kills as in `make soak`, of every role but the judge: the runs end with the bits of undisturbed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.kills import DRAINED, DRIVER, NODE, Runner, result, run_trial, two_nodes, undisturbed
from tests.helpers.rl_world import make_world, overrides

# Beside two other files it overloads two cores, so that Ray misses its deadlines: `make soak` runs it, alone.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1200)]
PLANS = {
    0: ["rollout actor", "stream", "reward replica", "learner rank", NODE, DRAINED],
    1: ["reward replica", "stream", DRIVER, "rollout actor", "Train controller", DRAINED],
}


def test_runs_outlive_every_process(tmp_path: Path) -> None:
    """On-policy, group by group, and one version behind."""
    world = make_world(tmp_path)
    (world / "runs").mkdir()
    with two_nodes() as cluster:
        for staleness, roles in PLANS.items():
            calm, killed = (world / "runs" / f"{name}-{staleness}" for name in ("calm", "killed"))
            expected = undisturbed(cluster, settings(world, calm.name, staleness), calm)
            runner = Runner(cluster, settings(world, killed.name, staleness), killed)
            trial = run_trial(cluster, runner, staleness, roles, within_s=0.4)
            assert not trial.problem, f"{trial.problem}\n{runner.tail()}"
            assert [kill.role for kill in trial.kills] == roles
            weights, steps = result(killed)
            assert steps == expected[1]
            assert weights == expected[0]


def settings(world: Path, name: str, staleness: int) -> list[str]:
    """A run in the narrow world."""
    return overrides(
        world,
        f"run.name={name}",
        "train.steps=24",
        "train.checkpoint_every=1",
        "train.max_failures=-1",
        "train.learning_rate=1e-3",
        f"experience.max_staleness={staleness}",
        "experience.overlap=on",
        "evaluation.prompts=0",
        "tracking.grid_every=0",
    )
