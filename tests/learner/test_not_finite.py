"""What is not finite is never applied or written: an update is left out on all ranks, at every ZeRO stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner.checkpoints.checkpoint_shards import write_shard
from deepgen.config import UserError, load_settings
from tests.helpers.learner_workers import run_workers
from tests.helpers.toy import FAILURES, STEPS, check_toy, plain_torch, toy_result, toy_run

EMA = "train.ema_decay=0.9"
OFFLOAD = "train.offload_optimizer=true"
PLACES = [("0",), ("1",), ("2",), ("3",), ("1", OFFLOAD), ("2", OFFLOAD), ("3", OFFLOAD)]  # ZeRO stage, more
SAID = {
    "loss": "the loss is nan on rank {rank}",
    "only the loss": "the loss is nan on rank {rank}",
    "gradient": "the norm of the gradient is ",
    "norm": "the norm of the gradient is inf",
}


def log_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_an_update_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, world: int) -> None:
    """The rest is the training of plain torch without that update: weights, averages, learning rate, AdamW's count.

    The first update of all fails, whose moments do not exist yet, and a later one.
    """
    failing, runs = (0, 3), []
    for what in FAILURES:
        # ZeRO-3 computes the norm in fp64, where it is finite, and clips by it.
        places = {"loss": PLACES[:4], "norm": PLACES[:3]}.get(what, PLACES)
        for stage, *more in places:
            name = f"{what}-{stage}-{len(more)}".replace(" ", "-")
            options = (f"train.zero_stage={stage}", f"train.workers={world}", EMA, *more)
            runs.append((name, what, toy_run(tmp_path, name, *options, fails=(failing, what))))
    output = run_workers(tmp_path, [run for _, _, run in runs], world=world)
    expected = plain_torch(left_out=failing)
    assert any(not torch.equal(value, plain_torch().weights[name]) for name, value in expected.weights.items())
    for name, what, _ in runs:
        check_toy(tmp_path, name, expected)
        log = log_of(tmp_path, name)
        assert [entry["step"] for entry in log] == list(range(STEPS + 1))
        assert [entry["train/skipped_updates"] for entry in log[1:]] == [1, 1, 1, 2, 2, 2]
        for entry, norm in zip(log[1:], expected.norms, strict=True):
            if entry["step"] - 1 in failing:
                assert not math.isfinite(entry["train/grad_norm"]) or what == "only the loss"
            else:
                assert entry["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    for what, said in SAID.items():
        for step, counts in ((0, "1 left out, 1 in a row, 1 in all"), (3, "1 left out, 1 in a row, 2 in all")):
            begin = f"step {step}: {said.format(rank=world - 1)}"
            lines = [line for line in output.splitlines() if line.startswith(begin)]
            assert len(lines) >= 3 and all(f"; updates: {counts}; kept" in line for line in lines), what


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_run_with_updates_left_out_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit. It is killed when only updates that were left out are in its checkpoint, and later on."""
    failing = (0, 1, 3)
    for stage in (0, 3):
        options = (f"train.zero_stage={stage}", EMA)
        whole = toy_run(tmp_path / "whole", f"zero{stage}", *options, noise=0.3, fails=(failing, "gradient"))
        cut = toy_run(tmp_path / "cut", f"zero{stage}", *options, noise=0.3, fails=(failing, "gradient"))
        again = cut | {"overrides": [*cut["overrides"], "run.resume=true"]}
        run_workers(tmp_path, [whole, cut | {"die_after": 3}], exit_code=9)
        run_workers(tmp_path, [again | {"die_after": 3}], exit_code=9)
        run_workers(tmp_path, [again])
        last = log_of(tmp_path / "cut", f"zero{stage}")[-1]
        assert (last["step"], last["train/skipped_updates"]) == (STEPS, 3)
        for part in ("model", "model-ema"):
            expected, result = (toy_result(tmp_path / which, f"zero{stage}", part) for which in ("whole", "cut"))
            assert all(torch.equal(result[name], expected[name]) for name in expected), (stage, part)


@pytest.mark.processes
@pytest.mark.slow
def test_of_several_updates_a_batch_only_the_bad_ones_are_left_out(tmp_path: Path) -> None:
    options = (EMA, "algorithm.updates_per_batch=3")
    runs = [
        toy_run(tmp_path, f"zero{stage}", f"train.zero_stage={stage}", *options, fails=((2,), "loss"))
        for stage in (0, 2)
    ]
    output = run_workers(tmp_path, runs)
    expected = plain_torch(options[1:], left_out=(2,))
    for stage in (0, 2):
        check_toy(tmp_path, f"zero{stage}", expected)
        assert [entry["train/skipped_updates"] for entry in log_of(tmp_path, f"zero{stage}")[1:]] == [0, 0, 3, 3, 3, 3]
    assert output.count("step 2: the loss is nan on rank 0; updates: 3 left out, 3 in a row, 3 in all; kept") == 2


@pytest.mark.processes
@pytest.mark.slow
def test_the_batch_and_its_state_are_kept_of_the_first_three(tmp_path: Path) -> None:
    """From there the step can be trained again: alone it does what it does in an undisturbed run."""
    places = [("0", 1), ("3", 2)]
    for stage, world in places:
        options, folder = (f"train.zero_stage={stage}", f"train.workers={world}"), tmp_path / stage
        state = folder / "failed" / "replay" / "failed-step-000002" / "state"
        failed = toy_run(folder, "failed", *options, fails=((2, 3, 4, 5), "loss"))
        alone = toy_run(folder, "alone", *options, replays=(2, str(state)))
        run_workers(folder, [toy_run(folder, "whole", *options), failed, alone], world=world)
        kept = sorted(path.name for path in (folder / "failed" / "replay").iterdir())
        assert kept == [f"failed-step-00000{step}" for step in (2, 3, 4)]
        (again,), whole = log_of(folder, "alone"), log_of(folder, "whole")
        assert again["step"] == 3
        for key in ("loss/total", "train/grad_norm", "train/learning_rate"):
            assert again[key] == pytest.approx(whole[3][key], rel=1e-5)


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_without_updates_ends_with_one_line(tmp_path: Path) -> None:
    """After 5 in a row, also if it was killed in between; fewer in a shorter run. All ranks say the same."""
    two = ("train.workers=2", "train.zero_stage=2", "train.steps=12")
    long = toy_run(tmp_path, "long", *two, fails=(range(3, 12), "gradient"), ends=str(tmp_path))
    short = toy_run(tmp_path, "short", *two[:2], "train.steps=2", fails=(range(2), "loss"), ends=str(tmp_path))
    cut = toy_run(tmp_path, "cut", *two, fails=(range(3, 12), "gradient"))
    run_workers(tmp_path, [long, short, cut | {"die_after": 6}], world=2, exit_code=9)
    again = cut | {"overrides": [*cut["overrides"], "run.resume=true"], "ends": str(tmp_path)}
    run_workers(tmp_path, [again], world=2)
    for name, step, count in (("long", 7, 5), ("cut", 7, 5), ("short", 1, 2)):
        first, second = ((tmp_path / f"{name}.{rank}.error").read_text() for rank in (0, 1))
        assert first == second and "\n" not in first
        assert first.startswith(f"step {step}: the ")
        assert f"; updates left out in a row: {count}, so the run ends; a smaller train.learning_rate may help" in first
        assert not (tmp_path / name / "model").exists()
    steps = sorted(path.name for path in (tmp_path / "long" / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, stage: int) -> None:
    """An update of finite gradients can make them: the run ends before averages, publishing and checkpoint."""
    options = (f"train.zero_stage={stage}", "train.workers=2", "train.weight_decay=1e300", "train.checkpoint_every=1")
    run_workers(tmp_path, [toy_run(tmp_path, "a", *options, EMA, ends=str(tmp_path))], world=2)
    said = (tmp_path / "a.0.error").read_text()
    assert said.startswith("step 0: ") and "weight is no longer finite after the update" in said
    assert said == (tmp_path / "a.1.error").read_text()
    assert list((tmp_path / "a").rglob("*.safetensors")) == []
    assert [entry["step"] for entry in log_of(tmp_path, "a")] == [0]


@pytest.mark.processes
def test_a_checkpoint_with_such_a_number_is_not_resumed_from(tmp_path: Path) -> None:
    """Whoever wrote it, in weights, moments or averages. The line names its folder."""
    from safetensors.torch import load_file, save_file

    from deepgen.fingerprint import file_checksum

    places = {"weight:out.bias@0": "out.bias", "exp_avg_sq:out.bias@0": "exp_avg_sq:out.bias", "out.bias@0": "out.bias"}
    runs = [toy_run(tmp_path, f"run-{i}", EMA, "train.steps=2") for i in range(len(places))]
    run_workers(tmp_path, runs)
    for i, place in enumerate(places):
        file = tmp_path / f"run-{i}" / "checkpoints" / "step-000002" / "engine-0.safetensors"
        file = file if ":" in place else file.with_name("ema-0.safetensors")
        pieces = load_file(file)
        pieces[place][0] = math.nan
        save_file(pieces, file)
        file.with_suffix(".blake2b").write_text(file_checksum(file))
    more = ["run.resume=true", "train.steps=4"]
    run_workers(tmp_path, [run | {"overrides": [*run["overrides"], *more], "ends": str(tmp_path)} for run in runs])
    for i, said in enumerate(places.values()):
        folder = tmp_path / f"run-{i}" / "checkpoints" / "step-000002"
        assert (tmp_path / f"run-{i}.0.error").read_text().startswith(f"{folder}: {said} is not finite; remove this")


def test_no_shard_is_written_with_such_a_number(tmp_path: Path) -> None:
    """Averages and moments too, in whatever way they came to be so."""
    for value in (math.nan, -math.inf):
        pieces = [("exp_avg_sq:w", 0, torch.tensor([1.0, value]))]
        with pytest.raises(UserError, match=r"exp_avg_sq:w@0 is not finite, so engine-0 is not written"):
            write_shard(tmp_path, "engine", 0, pieces)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=nan",
        "train.learning_rate=.nan",
        "train.weight_decay=.inf",
        "train.weight_decay=1e400",
        "train.grad_clip=.inf",
        "algorithm.kl_beta=-.inf",
        "data.weights={a: .inf}",
        "tracking.alarms={kl: .nan}",
        "experience.deadline_s=.inf",
        "rewards.clip.deadline_s=1e400",
        "rewards.clip.gpus=.nan",
        "rewards.weights.t2i.clip=nan",
        "rewards.weights.t2i.clip=.nan",
        "rewards.weights.t2i.clip=inf",
        "rewards.weights.t2i.clip=1e400",
        "rewards.weights.t2i.clip=1e39",  # infinite as fp32
    ],
)
def test_settings_are_finite_numbers(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(None, [override])
    key = override.partition("=")[0]
    assert str(caught.value).startswith(key) and "\n" not in str(caught.value)
