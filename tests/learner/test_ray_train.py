"""`stages/sft.py` under Ray Train: a stopped or killed run ends with the same weights as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train import ControllerError, TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError

from actors.learner.ray_train import first_line
from tests.helpers.learner_workers import ROOT, run_workers
from tests.helpers.sft_world import component, make_sft_world, stage_overrides

pytestmark = pytest.mark.timeout(900)
SFT = ROOT / "stages" / "sft.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    return make_sft_world(tmp_path_factory.mktemp("world"), empty_database)


@contextmanager
def interruptible() -> Iterator[None]:
    """Child processes started inside react to Ctrl-C, even if the tests run in a shell's background and ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def start_sft(folder: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """Start stages/sft.py in run folder ``folder``/ray/a. Returns when its third checkpoint exists."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SFT), *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(process, folder, 3)
    return process


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Return when the run has a checkpoint of this step or a later one."""
    checkpoints = folder / "ray" / "a" / "checkpoints"
    while process.poll() is None and not any(
        int(path.name.removeprefix("step-")) >= step for path in checkpoints.glob("step-*")
    ):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]


def ray_processes(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """The run's Ray processes with this title."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.cmdline()[:1] and child.cmdline()[0].startswith(f"ray::{name}")]


@pytest.mark.ray
@pytest.mark.slow
def test_sft_under_ray_train_interrupted_and_resumed(world: Path, tmp_path: Path) -> None:
    """Ctrl-C gives exit code 130 and prints how to continue. The resumed run ends with an undisturbed run's weights."""
    overrides = stage_overrides(world, tmp_path / "ray", "a", "train.steps=12")
    with interruptible():
        first = start_sft(tmp_path, overrides)
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 130, output
    assert "to continue:" in output and "--resume" in output

    command = [sys.executable, str(SFT), *overrides, "--resume"]
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resuming after step" in second.stdout and "step 12/12" in second.stdout
    alone = stage_overrides(world, tmp_path / "alone", "a", "train.steps=12")
    run_workers(tmp_path, [{"stage": "sft", "recipe": "tiny-sft", "overrides": alone}])
    for part in ("bridge", "transformer", "vlm_lora"):
        expected, result = component(tmp_path / "alone", "a", part), component(tmp_path / "ray", "a", part)
        assert all(torch.equal(result[name], expected[name]) for name in expected), part


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak  # `tests/soak/test_kills.py` kills both in rl
def test_a_killed_worker_and_a_killed_controller_are_started_again(world: Path, tmp_path: Path) -> None:
    """After SIGKILL of Ray Train's controller, then of one of two workers: both times all workers restart from the last
    checkpoint, and the result is the same.
    """
    options = ("train.workers=2", "train.steps=20", "train.max_failures=1")
    process = start_sft(tmp_path, stage_overrides(world, tmp_path / "ray", "a", *options, "cluster.num_cpus=4"))
    (controller,) = ray_processes(process, "TrainController")
    controller.kill()
    wait_for_step(process, tmp_path, 8)
    workers = ray_processes(process, "RayTrainWorker")
    assert len(workers) == 2
    workers[1].kill()
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert output.count("starting Ray Train again (1, train.max_failures 1): its controller died") == 1
    assert output.count("starting the workers again (1, train.max_failures 1): worker ") == 1
    assert "resuming after step" in output and "step 20/20" in output
    alone = stage_overrides(world, tmp_path / "alone", "a", *options)
    run_workers(tmp_path, [{"stage": "sft", "recipe": "tiny-sft", "overrides": alone}], world=2)
    for part in ("bridge", "transformer", "vlm_lora"):
        expected, result = component(tmp_path / "alone", "a", part), component(tmp_path / "ray", "a", part)
        assert expected and all(torch.equal(result[name], expected[name]) for name in expected), part


def test_a_worker_that_died_in_its_start_is_named_by_its_death() -> None:
    """Ray Train wraps it twice, and says itself no more than that a controller failed."""
    start = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    start.__cause__ = ActorDiedError()
    error: TrainingFailedError = ControllerError(start)
    assert "died" not in str(error)
    assert first_line(error) == "The actor died unexpectedly before finishing this task."


def test_a_worker_whose_connection_broke_is_named_so() -> None:
    gone = ActorUnavailableError("Connection reset by peer", b"1" * 16)
    line = first_line(WorkerHealthCheckFailedError("A worker health check failed.", gone))
    assert line.startswith("a process died or is out of reach: The actor ")
