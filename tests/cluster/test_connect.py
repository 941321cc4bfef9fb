"""Joining a cluster, and the check that it has the resources a run needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import deepgen.cluster.connect as connect_module
from deepgen.cluster.connect import connect
from deepgen.cluster.resources import (
    Capacity,
    Need,
    check_capacity,
    learner_needs,
    pool_resources,
    process_resources,
    rl_needs,
)
from deepgen.config import Settings, UserError, load_settings

TINY = Path(__file__).resolve().parents[2] / "stages" / "recipes" / "tiny-rl.yaml"


def laptop(cpus: float) -> Capacity:
    return Capacity({"CPU": cpus}, [{"CPU": cpus}])


@pytest.fixture
def tiny() -> Settings:
    return load_settings(TINY)


def test_the_tiny_run_fits_two_cores_with_two_learners(tiny: Settings) -> None:
    two = load_settings(TINY, ["train.workers=2"])
    assert sum(need.count * need.per_process["CPU"] for need in rl_needs(two, gpus=False)) <= 2
    check_capacity(rl_needs(two, gpus=False), laptop(2))
    check_capacity(rl_needs(tiny, gpus=False), laptop(1))


def test_only_rewards_with_a_weight_are_counted() -> None:
    settings = load_settings(TINY, [f"rewards.weights.{t}={{ocr: 1.0}}" for t in ("t2i", "reasoning", "text", "edit")])
    roles = [need.role for need in rl_needs(settings, gpus=False)]
    assert roles == ["learner worker", "rollout actor", "experience stream", "ocr reward"]


def test_what_can_never_be_had_is_one_clear_line(tiny: Settings) -> None:
    settings = load_settings(TINY, ["rollout.actors=40"])
    with pytest.raises(UserError, match=r"needs 8\.6 CPU \(.*40 x rollout actor \(rollout\.actors\).*at most 2$"):
        check_capacity(rl_needs(settings, gpus=False), laptop(2))


def test_a_process_must_fit_one_node() -> None:
    needs = [Need("learner worker", 1, {"CPU": 1, "GPU": 2}, "train.workers")]
    nodes = Capacity({"CPU": 8, "GPU": 4}, [{"CPU": 2, "GPU": 1}] * 4)
    with pytest.raises(UserError, match=r"one learner worker needs 1 CPU and 2 GPU.*largest have 2 CPU and 1 GPU$"):
        check_capacity(needs, nodes)


def test_on_gpus_learner_rollout_and_judge_have_one_each() -> None:
    processes = [process_resources(role, gpus=True) for role in ("learner", "rollout")]
    pools = [pool_resources(Settings().rewards.pools[name], gpus=True) for name in ("judge", "ocr")]
    assert [resources.get("GPU") for resources in (*processes, *pools)] == [1, 1, 1, None]
    assert "GPU" not in pool_resources(Settings().rewards.pools["judge"], gpus=False)
    assert "GPU" not in process_resources("learner", gpus=False)


def test_a_cluster_that_does_not_start_in_time_is_one_line(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with too much to do. Ray says so with an Exception that is nothing more."""

    def late(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("deepgen.cluster.connect.start_private", late)
    monkeypatch.setattr("deepgen.cluster.connect._prepare_private", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        UserError, match=r"^cluster\.address: cannot start a Ray cluster here: The current node timed out"
    ):
        connect_module._join_or_start(tiny, None)


def test_nodes_an_autoscaler_may_start_count() -> None:
    """The cluster has no nodes yet, but may start four."""
    check_capacity([Need("rollout actor", 8, {"GPU": 1}, "rollout.actors")], Capacity({"GPU": 8}, [{}, {"GPU": 2}]))


@pytest.mark.ray
def test_connect_checks_the_cluster_it_is_in(ray_local: ModuleType, tiny: Settings) -> None:
    assert connect(tiny, rl_needs) is False
    assert connect(tiny) is False
    large = load_settings(TINY, ["train.workers=12"])
    with pytest.raises(UserError, match=r"needs 4\.2 CPU \(12 x learner worker \(train\.workers\)\).*at most 4$"):
        connect(large, learner_needs)


CONNECT = "from deepgen.cluster.connect import connect; from deepgen.config import load_settings, run_program\n"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-c", CONNECT + code], os.environ | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "error: cluster.address: no Ray cluster answers at 127.0.0.1:1 (Connection refused)"),
        ("127.0.0.1:99999", "error: cluster.address: no Ray cluster answers at 127.0.0.1:99999 ("),
        ("http://127.0.0.1:8265", "error: cluster.address: got 'http://127.0.0.1:8265'; allowed: auto-local"),
        ("head", "error: cluster.address: got 'head'; allowed: auto-local"),
    ],
)
def test_a_cluster_that_is_not_there_is_a_user_error(address: str, message: str) -> None:
    result = python(f"run_program(lambda: connect(load_settings(None, ['cluster.address={address}'])))")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
