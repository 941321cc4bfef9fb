"""Checkpoints are written behind the training: what they hold, how failures come up, and what waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.learner.checkpoints import background, checkpoint_shards
from actors.learner.checkpoints.background import Background, Place
from actors.learner.checkpoints.checkpoint_shards import ShardReader
from actors.learner.checkpoints.checkpoint_store import CheckpointStore
from deepgen.config import UserError
from tests.helpers.learner_workers import run_workers
from tests.helpers.toy import start, toy_run

WAIT_S = 20.0
FAILED = r"run\.dir: cannot write the checkpoint of step 1 to .*: the disk is full; make room, then continue with --re"


class Disk:
    """Writes shards when it is allowed to, and fails if it is told to."""

    def __init__(self, write: Callable[[dict[str, Tensor], Path], None]) -> None:
        self.allowed, self.error, self._write = threading.Event(), list[Exception](), write

    def save_file(self, tensors: dict[str, Tensor], file: Path) -> None:
        assert self.allowed.wait(WAIT_S)
        if self.error:
            raise self.error.pop()
        self._write(tensors, file)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    stand_in = Disk(checkpoint_shards.save_file)
    monkeypatch.setattr(checkpoint_shards, "save_file", stand_in.save_file)
    return stand_in


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(start(tmp_path), "sft")


def engine_with(weight: Tensor) -> Any:
    return SimpleNamespace(rank=0, world=1, parameters=[], pieces=lambda: [("weight:w", 0, weight)])


def test_what_changes_after_the_copy_is_not_written(disk: Disk, store: CheckpointStore) -> None:
    """The next checkpoint, which uses the same memory, holds the change."""
    weight, state = torch.ones(5), {"step": 1, "rewards": [1.0]}
    store.save(1, engine_with(weight), None, state)
    weight.fill_(2)  # the next step, while nothing is on disk yet
    state["rewards"].append(2.0)  # type: ignore[attr-defined]  # a list
    assert store.newest() is None
    disk.allowed.set()
    store.save(2, engine_with(weight), None, {"step": 2})
    store.finish()
    for step in (1, 2):
        assert ShardReader(store.path(step), "engine", 0).read("weight:w", 0, 5).tolist() == [float(step)] * 5
    newest = store.newest()
    assert newest is not None and newest.step == 2
    assert '"rewards": [\n   1.0\n  ]' in (store.path(1) / "manifest.json").read_text()


def test_a_failure_comes_up_at_the_next_save_or_at_the_end(disk: Disk, store: CheckpointStore) -> None:
    engine = engine_with(torch.ones(5))
    disk.allowed.set()
    for ask in (lambda: store.save(2, engine, None, {}), store.finish):
        disk.error = [OSError("the disk is full")]
        store.save(1, engine, None, {})  # returns
        with pytest.raises(UserError, match=FAILED):
            ask()
        assert [path.name for path in store.folder.iterdir()] == [".writing-step-000001"]
        assert store.newest() is None
    store.save(1, engine, None, {})
    store.finish()
    store.finish()  # nothing is under way
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]


def test_what_is_no_matter_of_the_disk_stays_what_it_is(disk: Disk, store: CheckpointStore) -> None:
    def refuse(folder: Path) -> None:
        raise ZeroDivisionError("an actor refused the weights")

    disk.allowed.set()
    store.save(1, engine_with(torch.ones(5)), None, {}, refuse)
    with pytest.raises(ZeroDivisionError, match="refused"):
        store.finish()


def test_close_waits_and_hides_no_error(disk: Disk, store: CheckpointStore) -> None:
    said: list[str] = []
    store.save(1, engine_with(torch.ones(5)), None, {})
    threading.Timer(0.2, disk.allowed.set).start()
    store.close(said.append)
    newest = store.newest()
    assert newest is not None and newest.step == 1 and said == []

    other = CheckpointStore(store._settings, "sft")
    disk.error = [OSError("the disk is full")]
    other.save(2, engine_with(torch.ones(5)), None, {})
    other.close(said.append)
    assert said == [f"cannot write the checkpoint of step 2 to {store.folder}: the disk is full"]


def test_files_that_never_come_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of three, alone: its thread ends with the ranks that have written nothing."""
    monkeypatch.setattr(background, "OTHERS_S", 0.1)
    monkeypatch.setattr(background, "gather", lambda mine, world: [mine, None, None])
    work, completed = Background(), list[dict[str, int]]()
    for listed in ("{}", '{"engine-2.safetensors": 7}'):  # all there; not as long as it should be
        for rank, content in ((1, "{}"), (2, listed)):
            (tmp_path / f".{rank}.written").write_text(content)
        (tmp_path / "engine-2.safetensors").write_bytes(bytes(6))
        work.start("it", Place(tmp_path, 0, 3), {"engine": [("w", 0, torch.ones(2))]}, None, completed.append)
        if listed == "{}":
            work.finish()
    says = r"cannot write it: rank 0: ranks \[2\] have not written their files after 0 s; make room"
    with pytest.raises(UserError, match=says):
        work.finish()
    assert [sorted(files) for files in completed] == [["engine-0.blake2b", "engine-0.safetensors"]]


@pytest.mark.processes
def test_all_ranks_end_if_one_cannot_write(tmp_path: Path) -> None:
    """Neither hangs: both end with the line that names rank 1, when step 4's checkpoint is due."""
    run = toy_run(tmp_path, "a", "train.zero_stage=2", "train.workers=2", fail_writing=1)
    output = run_workers(tmp_path, [run], world=2, exit_code=1)
    says = "rank 1: no room for engine-1.safetensors; make room, then continue with --resume"
    lines = [line for line in output.splitlines() if line.startswith("deepgen.errors.UserError")]
    assert len(lines) == 2 and all("cannot write the checkpoint of step 2" in line and says in line for line in lines)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == [".writing-step-000002"]
