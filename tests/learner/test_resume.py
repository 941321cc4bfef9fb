"""A checkpoint can resume with other workers, another ZeRO stage, offloaded or not, and gives the same result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from actors.learner.checkpoints.checkpoint_shards import ShardReader, write_shard
from deepgen.config import UserError, load_settings
from tests.helpers.learner_workers import run_workers
from tests.helpers.toy import STEPS, check_toy, plain_torch, toy_result, toy_run

CUT = 3  # steps before the stop
CONSTANT = ("train.schedule=constant", "train.ema_decay=0.9", "train.checkpoint_every=3")


def run(folder: Path, name: str, workers: int, stage: int, *more: str) -> dict[str, Any]:
    return toy_run(folder, name, *CONSTANT, f"train.workers={workers}", f"train.zero_stage={stage}", *more)


def stopped(folder: Path, workers: int, stage: int, *more: str) -> dict[str, Any]:
    """A run that ends after CUT steps."""
    return run(folder, f"cut-{workers}-{stage}", workers, stage, f"train.steps={CUT}", *more)


def resumed(folder: Path, before: tuple[int, int], workers: int, stage: int, *more: str) -> dict[str, Any]:
    """The rest of the run that stopped with `before` (workers, stage), on its own copy of the checkpoint."""
    name = "{}-{}-to-{}-{}".format(*before, workers, stage)
    source = folder / "cut-{}-{}".format(*before) / "checkpoints" / f"step-{CUT:06d}"
    shutil.copytree(source, folder / name / "checkpoints" / source.name)
    return run(folder, name, workers, stage, "run.resume=true", *more)


@pytest.mark.processes
@pytest.mark.slow
def test_other_workers_and_other_zero_stages(tmp_path: Path) -> None:
    """2 -> 1, 1 -> 2 and changes of stage end like plain training. An unchanged layout gives a bit-identical result."""
    whole = [run(tmp_path, f"whole-{stage}", 2, stage) for stage in (0, 1, 2, 3)]
    run_workers(tmp_path, [*(stopped(tmp_path, 2, stage) for stage in (0, 1, 2, 3)), *whole], world=2)
    fewer = [
        resumed(tmp_path, (2, before), 1, after) for before, after in [(0, 2), (1, 1), (2, 3), (2, 0), (3, 3), (3, 1)]
    ]
    run_workers(tmp_path, [*(stopped(tmp_path, 1, stage) for stage in (1, 3)), *fewer])
    more = [resumed(tmp_path, (1, before), 2, after) for before, after in [(1, 1), (3, 2), (1, 3)]]
    other = [resumed(tmp_path, (2, before), 2, after) for before, after in [(2, 3), (3, 1), (2, 0), (0, 3)]]
    same = [resumed(tmp_path, (2, stage), 2, stage) for stage in (0, 1, 2, 3)]
    output = run_workers(tmp_path, [*more, *other, *same], world=2)
    assert f"resuming after step {CUT} of {STEPS}, written by 1 worker(s) at ZeRO-3" in output

    expected = plain_torch(CONSTANT)
    results = sorted(path.name for path in tmp_path.glob("*-to-*") if path.is_dir())
    assert len(results) == len([*fewer, *more, *other, *same])
    for name in results:
        check_toy(tmp_path, name, expected)
    for stage in (0, 1, 2, 3):
        for part in ("model", "model-ema"):
            undisturbed = toy_result(tmp_path, f"whole-{stage}", part)
            result = toy_result(tmp_path, f"2-{stage}-to-2-{stage}", part)
            assert all(torch.equal(result[name], undisturbed[name]) for name in undisturbed), (stage, part)


@pytest.mark.processes
@pytest.mark.slow
def test_offloaded_optimizer_states(tmp_path: Path) -> None:
    """Offloading gives the same training in each ZeRO stage, and checkpoints work in both directions."""
    offload = "train.offload_optimizer=true"
    run_workers(
        tmp_path,
        [
            *(run(tmp_path, f"whole-{stage}", 2, stage, offload) for stage in (1, 2, 3)),
            stopped(tmp_path, 2, 2, offload),
            stopped(tmp_path, 2, 3),
        ],
        world=2,
    )
    run_workers(tmp_path, [resumed(tmp_path, (2, 2), 1, 3), resumed(tmp_path, (2, 3), 1, 2, offload)])
    expected = plain_torch(CONSTANT)
    for name in ("whole-1", "whole-2", "whole-3", "2-2-to-1-3", "2-3-to-1-2"):
        check_toy(tmp_path, name, expected)
    with pytest.raises(UserError, match=r"train\.offload_optimizer: got true with train\.zero_stage 0; allowed: false"):
        load_settings(None, [offload, "train.zero_stage=0"])


def test_pieces_are_found_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(10.0)
    for rank in range(3):
        start = rank * 4
        write_shard(tmp_path, "engine", rank, [("w:a@b", start, values[start : start + 4])])
    write_shard(tmp_path, "engine", 3, [("w:a@b", 12, values[:0])])
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [f"engine-{rank}.safetensors" for rank in range(3)]

    opened: list[Path] = []

    def spy(file: Path, **options: Any) -> Any:
        opened.append(file)
        return safe_open(file, **options)

    monkeypatch.setattr("actors.learner.checkpoints.checkpoint_shards.safe_open", spy)
    reader = ShardReader(tmp_path, "engine", 1)
    assert torch.equal(reader.read("w:a@b", 4, 4), values[4:8])
    assert [file.name for file in opened] == ["engine-1.safetensors"]  # the rank's own shard is enough
    for start in range(10):
        for end in range(start, 11):
            assert torch.equal(reader.read("w:a@b", start, end - start), values[start:end])
    with pytest.raises(UserError, match=r"1 of 4 elements of w:a@b from 7 on are not there"):
        reader.read("w:a@b", 7, 4)


@pytest.mark.ray
def test_only_what_may_go_well_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train restarts after a dead worker, but not after a worker's own error or a loss that is not finite."""
    from ray import cloudpickle
    from ray.train import FailureConfig
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.exceptions import WorkerGroupError

    from actors.experience.rollout_fleet import NoRolloutLeftError
    from actors.experience.scoring.pool_parts import RewardPoolError
    from actors.learner import ray_train
    from actors.learner.console import FILE
    from actors.learner.ray_train import _failure_policy

    settings = load_settings(None, [f"run.dir={tmp_path}", "run.name=a", "train.max_failures=1"])
    policy = _failure_policy(settings, FailureConfig(max_failures=1))
    for recurring in (
        UserError("data.train: row 3"),
        FloatingPointError("loss of step 3 on rank 1 is nan"),
        RewardPoolError("reward pool judge has no replica left"),
        NoRolloutLeftError("no rollout actor is left"),
    ):
        failed = WorkerGroupError("", {0: RuntimeError("connection closed by peer"), 1: recurring})
        assert policy.make_decision(failed) is FailureDecision.RAISE
    remote = RuntimeError("ray::ExperienceStream.next_batch() (pid=7)\nlong story")
    remote.cause = RuntimeError("the actor died\nlong story")  # type: ignore[attr-defined]  # as Ray's exceptions do
    died = WorkerGroupError("", {1: remote})
    policy = cloudpickle.loads(cloudpickle.dumps(policy))  # as Ray Train's controller receives it
    assert [policy.make_decision(died) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]
    line = "starting the workers again (1, train.max_failures 1): worker 1: the actor died\n"
    assert (tmp_path / "a" / FILE).read_text() == line
    newest = iter((4, 8, 8, 4, 5, 6, 6, 6))
    monkeypatch.setattr(ray_train, "newest_step", lambda settings: next(newest))
    policy = _failure_policy(settings, FailureConfig(max_failures=1))
    assert [policy.make_decision(died) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]
    policy = _failure_policy(settings, FailureConfig(max_failures=1))
    assert [policy.make_decision(died) for _ in range(2)] == [FailureDecision.RETRY] * 2
    assert (tmp_path / "a" / FILE).read_text() == 4 * line
    checked = WorkerGroupError("", {0: WorkerHealthCheckFailedError("A worker health check failed.", remote)})
    policy = _failure_policy(settings, FailureConfig(max_failures=1))
    assert policy.make_decision(checked) is FailureDecision.RETRY
    assert (tmp_path / "a" / FILE).read_text() == 4 * line + line.replace("worker 1", "worker 0")
