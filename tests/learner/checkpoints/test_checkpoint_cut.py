"""Checkpoints that are incomplete, damaged, in the way, or from another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.learner.checkpoints import checkpoint_shards
from actors.learner.checkpoints.checkpoint_store import CheckpointStore
from deepgen.config import UserError, load_settings
from tests.helpers.learner_workers import ROOT, run_workers
from tests.helpers.toy import start, toy_run


def test_wherever_a_checkpoint_is_cut_the_one_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends before each single disk operation. No partial checkpoint is used, and the next is complete."""

    class Killed(BaseException):
        """Not caught by `except Exception`."""

    engine: Any = SimpleNamespace(rank=0, world=1, parameters=[])
    engine.pieces = lambda: [("weight:w", 0, torch.arange(250.0))]
    newest: list[int] = []
    for operations in range(40):
        store = CheckpointStore(start(tmp_path, f"run.name=cut{operations}", "train.keep_checkpoints=1"), "rl")
        store.save(2, engine, None, {"step": 2})
        store.finish()
        left = operations

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    if real.__name__ == "write_text":
                        real(arguments[0], arguments[1][:50])  # half a manifest
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch, suppress(Killed):
            operations_on_disk = [(Path, name) for name in ("mkdir", "write_text", "rename", "unlink")]
            for owner, name in (*operations_on_disk, (shutil, "rmtree"), (checkpoint_shards, "flush")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            store.save(4, engine, None, {"step": 4})
            store.finish()
        found = store.newest()
        assert found is not None and found.source == {"step": found.step}
        newest.append(found.step)
        store.save(4, engine, None, {"step": 4})
        store.finish()
        assert [path.name for path in store.folder.iterdir()] == ["step-000004"]
        if left >= 0:
            break
    assert newest == sorted(newest) and newest.count(2) >= 6 and newest.count(4) >= 3


@pytest.mark.processes
def test_old_checkpoints_go_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    run = toy_run(tmp_path, "a", "train.keep_checkpoints=2")
    run_workers(tmp_path, [run])
    settings = load_settings(None, run["overrides"])
    store = CheckpointStore(settings, "rl")
    newest = store.newest()
    assert newest is not None and newest.step == 6
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000004", "step-000006"]
    largest = max((tmp_path / "a/checkpoints/step-000006").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    newest = store.newest()
    assert newest is not None and newest.step == 4

    for changed, stage, says in [
        ([], "sft", "stage: got sft"),
        (["model.preset=tiny"], "rl", "model.preset: got tiny"),
        (["run.seed=1"], "rl", "run.seed: got 1"),
        (["data.temperature=2"], "rl", "data.temperature: got 2.0; allowed: 1.0"),
        (["data.weights={a: 1}"], "rl", "data.weights: got {'a': 1.0}; allowed: {}"),
        (["train.ema_decay=0.5"], "rl", "train.ema_decay: got above 0"),
        (["train.steps=3"], "rl", "train.steps: got 3"),
        ([f"model.weights={ROOT / 'tests' / 'golden'}"], "rl", "is not what the checkpoint"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            CheckpointStore(load_settings(None, [*run["overrides"], *changed]), stage).check_fits(newest)
        assert "step-000004" in str(caught.value) and "\n" not in str(caught.value)
