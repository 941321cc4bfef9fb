"""A dozen kills as in `make soak`, of every role but the judge: the runs end with the bits of undisturbed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.kills import DRIVER, NODE, Runner, overrides, result, run_trial, two_nodes, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
PLANS = {
    0: ["rollout actor", "stream", "reward replica", "learner rank", NODE, "rollout actor"],
    1: ["reward replica", "stream", DRIVER, "rollout actor", "Train controller", "reward replica"],
}


def test_runs_outlive_every_process(tmp_path: Path) -> None:
    """On-policy, group by group, and one version behind."""
    with two_nodes() as cluster:
        for staleness, roles in PLANS.items():
            calm, killed = tmp_path / f"calm-{staleness}", tmp_path / f"killed-{staleness}"
            expected = undisturbed(cluster, overrides(tmp_path, calm.name, staleness, judge=False), calm)
            runner = Runner(cluster, overrides(tmp_path, killed.name, staleness, judge=False), killed)
            trial = run_trial(cluster, runner, staleness, roles)
            assert not trial.problem, f"{trial.problem}\n{runner.tail()}"
            assert [kill.role for kill in trial.kills] == roles
            weights, steps = result(killed)
            assert steps == expected[1]
            assert weights == expected[0]
