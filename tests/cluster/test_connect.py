"""Joining a cluster, and the check that it has the resources a run needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import deepgen.cluster.connect as connect_module
from deepgen.cluster.connect import connect
from deepgen.cluster.resources import learner_needs, rl_needs
from deepgen.config import Settings, UserError, load_settings

TINY = Path(__file__).resolve().parents[2] / "stages" / "recipes" / "tiny-rl.yaml"


@pytest.fixture
def tiny() -> Settings:
    return load_settings(TINY)


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


def test_another_version_of_ray_or_python_is_one_line(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray itself finds it, when the cluster's are others than ours."""
    from ray._private.utils import check_version_info

    def join(*_: object) -> None:
        theirs = {"ray_version": "2.9.0", "python_version": "3.9.1"}
        check_version_info(theirs, "this process", raise_on_mismatch=True, python_version_match_level="minor")

    monkeypatch.setattr("deepgen.cluster.connect._join", join)
    other = load_settings(TINY, ["cluster.address=10.0.0.1:6379"])
    with pytest.raises(
        UserError, match=r"^cluster\.address: cannot join .*: Version mismatch: .*Ray: 2\.9\.0 Python: 3\.9"
    ):
        connect_module._join_or_start(other, None)


@pytest.mark.ray
def test_connect_checks_the_cluster_it_is_in(ray_local: ModuleType, tiny: Settings) -> None:
    assert connect(tiny, rl_needs) is False
    assert connect(tiny) is False
    large = load_settings(TINY, ["train.workers=12"])
    with pytest.raises(UserError, match=r"^cluster: the run can never be placed: .*less \(train\.workers\)"):
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


def test_workers_of_a_joined_cluster_get_our_environment_and_what_the_job_sets_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in connect_module.QUIET_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    ours = connect_module.workers_environment(Path("/checkout"))
    assert ours == connect_module.QUIET_ENVIRONMENT | {"PYTHONPATH": "/checkout", "DEEPGEN_METRICS": "1"}
    environment = {"working_dir": "gcs://x.zip", "env_vars": {"HF_HUB_VERBOSITY": "info"}}
    job = {"runtime_env": environment, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setenv("DEEPGEN_METRICS", "0")
    monkeypatch.setenv("DEEPGEN_LOG", "json")
    submitted = connect_module.workers_environment(Path("/checkout"))
    reports = {"DEEPGEN_METRICS": "0", "DEEPGEN_LOG": "json", "DEEPGEN_SUBMISSION_ID": "raysubmit_1"}
    assert submitted == {k: v for k, v in ours.items() if k not in ("HF_HUB_VERBOSITY", "PYTHONPATH")} | reports
