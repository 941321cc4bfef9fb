"""The learner loop: one step per batch, equal on all ranks and ZeRO stages, exact after a kill; and its parts."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.learner.engine import parameter_groups
from actors.learner.loop import reduce_metrics
from actors.learner.lr_schedule import learning_rate
from deepgen.config import load_settings
from tests.helpers.learner_workers import run_workers
from tests.helpers.toy import STEPS, TOY, ToyModel, check_toy, plain_torch, toy_result, toy_run


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_zero_stage_is_plain_training_with_one_step_a_batch(tmp_path: Path, world: int) -> None:
    """The same global batch on 1, 2 and 4 workers, in all stages, gives the results of plain torch.

    Compared are losses, norms, weights and averages.
    """
    runs = [
        toy_run(tmp_path, f"zero{stage}", f"train.zero_stage={stage}", f"train.workers={world}", "train.ema_decay=0.9")
        for stage in range(4)
    ]
    run_workers(tmp_path, runs, world=world)
    expected = plain_torch()
    for stage in range(4):
        check_toy(tmp_path, f"zero{stage}", expected)
        log = [json.loads(line) for line in (tmp_path / f"zero{stage}.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log] == list(range(STEPS + 1))
        for entry, figures in zip(log[::2], expected.evaluations, strict=True):
            assert {k: v for k, v in entry.items() if k.startswith("heldout")} == pytest.approx(figures, rel=1e-5)
        del log[0]  # the start of the run
        np.testing.assert_allclose([entry["train/grad_norm"] for entry in log], expected.norms, rtol=1e-4)
        np.testing.assert_allclose([entry["loss/total"] for entry in log], expected.losses, rtol=1e-5)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_in_pieces_is_the_same_training(tmp_path: Path, world: int) -> None:
    """Gradients held back for a factor that is known only at the end, beside others that are not."""
    options = (f"train.workers={world}", "train.ema_decay=0.9")
    runs = [
        toy_run(tmp_path, f"zero{stage}", f"train.zero_stage={stage}", *options, pieces=True) for stage in (0, 1, 2)
    ]
    run_workers(tmp_path, runs, world=world)
    expected = plain_torch()
    for stage in (0, 1, 2):
        check_toy(tmp_path, f"zero{stage}", expected)
        log = [json.loads(line) for line in (tmp_path / f"zero{stage}.jsonl").read_text().splitlines()][1:]
        np.testing.assert_allclose([entry["train/grad_norm"] for entry in log], expected.norms, rtol=1e-4)
        np.testing.assert_allclose([entry["loss/total"] for entry in log], expected.losses, rtol=1e-5)
        np.testing.assert_allclose([entry["loss/toy"] for entry in log], expected.losses, rtol=1e-5)


@pytest.mark.processes
@pytest.mark.slow
def test_several_updates_a_batch_are_plain_training_with_as_many_steps(tmp_path: Path) -> None:
    """3 optimizer steps at one learning rate, then one step of the averages; AdamW's count goes on after a resume."""
    options = ("train.ema_decay=0.9", "algorithm.updates_per_batch=3")
    runs = [toy_run(tmp_path, f"zero{stage}", f"train.zero_stage={stage}", *options) for stage in (0, 2, 3)]
    cut = toy_run(tmp_path, "cut", "train.zero_stage=2", *options)
    run_workers(tmp_path, [*runs, cut | {"die_after": 3}], exit_code=9)
    run_workers(tmp_path, [cut | {"overrides": [*cut["overrides"], "run.resume=true"]}])
    expected, one = plain_torch(options[1:]), plain_torch()
    assert any(not torch.equal(value, one.weights[name]) for name, value in expected.weights.items())
    for stage in (0, 2, 3):
        check_toy(tmp_path, f"zero{stage}", expected)
        log = [json.loads(line) for line in (tmp_path / f"zero{stage}.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log] == list(range(STEPS + 1))
        np.testing.assert_allclose([entry["train/grad_norm"] for entry in log[1:]], expected.norms, rtol=1e-4)
        np.testing.assert_allclose([entry["loss/total"] for entry in log[1:]], expected.losses, rtol=1e-5)
    whole, resumed = toy_result(tmp_path, "zero2"), toy_result(tmp_path, "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit, with noise from torch's generator. Checkpoints are written while the next steps change the weights.

    Shards come in pairs, one of the engine and one of the averages. The run dies in step 6, before the slow thread has
    begun step 4's shards, or by SIGKILL at the fourth shard half written, when step 4's other files are on disk.
    """
    for stage, death, code in (
        (0, {"die_after": 5, "slow_writing": 0.5}, 9),
        (2, {"die_writing": 4}, -signal.SIGKILL),
    ):
        options = (f"train.zero_stage={stage}", "train.ema_decay=0.9")
        whole = toy_run(tmp_path / "whole", f"zero{stage}", *options, noise=0.3)
        cut = toy_run(tmp_path / "cut", f"zero{stage}", *options, noise=0.3)
        run_workers(tmp_path, [whole, cut | death], exit_code=code)
        run, log = tmp_path / "cut" / f"zero{stage}", tmp_path / "cut" / f"zero{stage}.jsonl"
        assert not (run / "model").exists()
        begun = run / "checkpoints" / ".writing-step-000004"
        names = ["ema-0.safetensors", "engine-0.blake2b", "engine-0.safetensors"] if stage == 2 else []
        assert sorted(path.name for path in begun.iterdir()) == names
        done = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert done in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3])  # the thread may be fast
        assert stage == 2 or len(done) == 6
        run_workers(tmp_path, [cut | {"overrides": [*cut["overrides"], "run.resume=true"]}])
        # Steps after the last checkpoint run twice.
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [*done, 3, 4, 5, 6]
        for part in ("model", "model-ema"):
            expected, result = (toy_result(tmp_path / which, f"zero{stage}", part) for which in ("whole", "cut"))
            assert all(torch.equal(result[name], expected[name]) for name in expected)
        steps = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert steps == ["step-000002", "step-000004", "step-000006"]


def test_learning_rate() -> None:
    settings = load_settings(None, [*TOY, "train.min_learning_rate=0.001", "train.steps=12"])
    rates = [learning_rate(settings, step) for step in range(12)]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert all(a >= b for a, b in pairwise(rates[2:])) and 0.001 < rates[-1] < 0.0015
    constant = load_settings(None, [*TOY, "train.schedule=constant"])
    assert learning_rate(constant, 5) == 0.01


def test_weight_decay_only_for_matrices() -> None:
    groups = parameter_groups(ToyModel().trainable_parameters("rl"), 0.1)
    assert [(group["weight_decay"], {p.dim() for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


def test_metrics_are_reduced_by_their_names() -> None:
    reported: list[Any] = [
        {"a": 1.0, "r_max": 3.0, "n_sum": 2},
        {"a": torch.tensor(2.0), "b": 5.0, "r_max": 1.0, "n_sum": 2},
    ]
    assert reduce_metrics(reported, 1) == {"a": 1.5, "b": 5.0, "r_max": 3.0, "n_sum": 4}
