"""MLflow's variables of the shell reach the learner, and neither they nor passwords what Ray shows of it."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import ray.cloudpickle

from actors.messages import LearnerJob
from deepgen.config import load_settings


def test_mlflow_variables_travel_in_the_job_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    settings = load_settings(None, ["tracking.uri=http://me:hunter2@server"])
    job = LearnerJob("rl", settings, print, gpus=False)
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    there = ray.cloudpickle.loads(ray.cloudpickle.dumps(job))
    assert there.variables["MLFLOW_TRACKING_TOKEN"] == "hunter2" and "hunter2" not in repr(there)
    assert all(name.startswith("MLFLOW_") for name in asdict(there)["variables"])
