"""Runs that write into one MLflow server with PostgreSQL at once, also while it is away for a while."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import postgres
from tests.helpers.servers import free_port

STEPS = 40
ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, address: str, name: str, first: int, last: int, *more: str) -> subprocess.Popen[str]:
    own = [f"run.dir={folder}", f"run.name={name}", "tracking.experiment=shared", *more]
    command = [sys.executable, "-m", "tests.helpers.tracked_run", str(first), str(last), *own]
    environment = os.environ | {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[str, int]:
    """The id of the MLflow run, and how many attempts to send something have failed. None was refused."""
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    run_id, failed, refused = said.split()
    assert refused == "0", errors[-3000:]
    return run_id, int(failed)


@pytest.mark.processes
@pytest.mark.soak
@pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
def test_two_runs_and_a_resume_write_at_once_and_outlast_a_restart_of_the_server(tmp_path: Path) -> None:
    port = free_port()
    with postgres.database() as database:
        with postgres.mlflow_server(tmp_path, database, port) as address:
            first, _ = ended(start(tmp_path, address, "resumed", 1, 10))
            more = [start(tmp_path, address, name, 1, STEPS) for name in ("one", "two")]
            more.append(start(tmp_path, address, "resumed", 11, STEPS, "run.resume=true"))
            journals = [tmp_path / name / "metrics.jsonl" for name in ("one", "two", "resumed")]
            while any(not path.exists() or len(path.read_bytes().splitlines()) < 12 for path in journals):
                assert all(process.poll() is None for process in more)
                time.sleep(0.1)
        time.sleep(1)  # it is away
        with postgres.mlflow_server(tmp_path, database, port) as address:
            found = [ended(process) for process in more]
            check(address, [run_id for run_id, _ in found], first)
    assert all(failed for _, failed in found)
    password = database.split(":")[2].partition("@")[0].encode()
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and password in file.read_bytes()]


def check(address: str, run_ids: list[str], first: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address)
    assert run_ids[2] == first and len(set(run_ids)) == 3
    assert len({client.get_run(run_id).info.experiment_id for run_id in run_ids}) == 1
    for run_id in run_ids:
        run = client.get_run(run_id)
        history = client.get_metric_history(run_id, "reward/total")
        assert [(one.step, one.value) for one in history] == [(step, step / 10) for step in range(1, STEPS + 1)]
        assert (run.data.metrics["Loss/图"], run.data.metrics["_x006c_oss/图"]) == (1.0, 2.0)
        assert run.data.metrics["a_x003a_b"] == STEPS and run.info.status == "FINISHED"
        assert run.data.tags["alarm.kl"] == f"since step {STEPS}\\x00\\ud800"
        assert run.data.tags["attempts"] == ("2" if run_id == first else "1")
        files = {item.path for item in client.list_artifacts(run_id)}
        assert {"settings.yaml", "mlflow_names.json", "images"} <= files
        pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
        steps = {int(path.split("+")[2]) for path in pictures}  # one may be there twice: its answer was lost
        assert steps == set(range(10, STEPS + 1, 10))
