"""`stages/rl.py --rollout-only` and `--train-only`: the two halves of a step, and a step that fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.experience.prompt_order import PromptOrder
from deepgen.config import Settings, UserError, stage_command
from deepgen.data.parquet import write_records
from stages.rl_replay import rollout_only, train_only
from tests.helpers.rl_world import PROMPTS, make_records, make_settings, make_world
from tests.stages.test_rl_loop import decided, finish, metrics, start

RAY = (pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900))
# Held back in pieces, beside a KL and an auxiliary loss: the longest way from scores to a gradient.
SETTINGS = (
    "train.steps=2",
    "train.learning_rate=1e-3",
    "experience.overlap=on",
    "evaluation.prompts=0",
    "rollout.actors=1",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "runs").mkdir()
    shutil.copy(empty_database, folder / "runs" / "mlflow.db")
    return folder


def marked(test: Callable[..., None]) -> Callable[..., None]:
    for mark in RAY:
        test = mark(test)
    return test


def refusal(settings: Settings, option: str, value: str) -> str:
    """Why an option is refused, before anything starts."""

    def never(*_: Any) -> None:
        raise AssertionError("it starts")

    halves = {"--rollout-only": partial(rollout_only, never), "--train-only": partial(train_only, Path())}
    with pytest.raises(UserError) as caught:
        halves[option](settings, value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_one_line_before_anything_starts(world: Path) -> None:
    settings, steps = make_settings(world, "run.name=mine"), world / "steps"
    assert "--rollout-only: got '0'; allowed: a number of steps" in refusal(settings, "--rollout-only", "0")
    assert "there is no step-*.json" in refusal(settings, "--train-only", str(steps))
    steps.mkdir()
    (steps / "step-000000.json").write_text('{"format": 9}')
    assert "format 9; allowed: 1" in refusal(settings, "--train-only", str(steps))
    mine = settings.run.folder / "replay"
    assert "lies in the folder of run 'mine'" in refusal(settings, "--train-only", str(mine))
    shutil.copytree(steps, mine)
    assert "has steps already" in refusal(settings, "--rollout-only", "1")
    resumed = make_settings(world, "run.name=mine", "run.resume=true")
    for option in ("--rollout-only", "--train-only"):
        assert f"{option}: got --resume" in refusal(resumed, option, "1")


@marked
@pytest.mark.soak  # its halves are in tests/objectives/test_replay_files.py and tests/learner/test_not_finite.py
def test_recorded_steps_train_as_they_do_on_line(world: Path) -> None:
    """The first update has the same loss, gradient and metrics, bit for bit."""
    output = finish(start(world, "run.name=drawn", *SETTINGS, "--rollout-only", "2"))
    folder = world / "runs" / "drawn" / "replay"
    assert f"--recipe {folder / 'recipe.yaml'} --train-only {folder}" in output
    names = sorted(file.name for file in folder.iterdir())
    steps = [f"step-00000{step}.{end}" for step in (0, 1) for end in ("json", "safetensors")]
    assert names == ["recipe.yaml", *steps]

    finish(start(world, "run.name=alone", *SETTINGS, "--train-only", str(folder)))
    finish(start(world, "run.name=online", *SETTINGS))
    alone, online = metrics(world / "runs" / "alone"), metrics(world / "runs" / "online")
    assert decided(alone[1]) == decided(online[1])
    assert {"loss/total", "loss/sft", "policy/kl", "train/grad_norm", "rollout/diversity"} <= alone[1].keys()
    assert alone[2]["policy/staleness_max"] == 1  # the first policy drew both


@marked
@pytest.mark.soak  # the toy model's in tests/learner/test_not_finite.py does the same in seconds
def test_a_step_that_fails_can_be_trained_on_alone(world: Path) -> None:
    """An advantage is NaN in step 1; the learner saves its batch and weights and goes on. Alone it fails again."""
    records = make_records(PROMPTS, "rl")
    _, second = PromptOrder(records, seed=3).at(2)  # two prompts a step
    bad = [replace(record, prompt=f"{record.prompt}, exploding") if record == second else record for record in records]
    write_records(world / "exploding.parquet", bad)
    settings = (
        "train.steps=3",
        "train.learning_rate=1e-3",
        "evaluation.prompts=0",
        f"data.prompts={world / 'exploding.parquet'}",
        "rewards.aesthetic.class=tests.helpers.visible_rewards:Exploding",
        "algorithm.advantage=tests.helpers.visible_rewards:exploding",
    )
    output = finish(start(world, "run.name=failed", *settings))
    folder = world / "runs" / "failed" / "replay" / "failed-step-000001"
    said = (
        "step 1: the loss is nan on rank 0; updates: 1 left out, 1 in a row, 1 in all; not finite: the advantages of "
    )
    command = stage_command("rl", "--recipe", folder / "recipe.yaml", "--train-only", folder)
    (line,) = {line for line in output.splitlines() if line.startswith(said)}
    assert line.endswith(f"; to train on its batch alone: {command}")
    log = metrics(world / "runs" / "failed")
    assert [log[step]["train/skipped_updates"] for step in (1, 2, 3)] == [0, 1, 1]
    assert "loss/total" not in log[2]
    assert (folder / "state" / "engine-0.safetensors").exists()

    alone = start(world, "run.name=failed-alone", *settings, "--train-only", str(folder))
    output, _ = alone.communicate(timeout=600)
    assert alone.returncode == 2, output[-4000:]
    assert output.splitlines()[-1].startswith(
        "error: step 1: the loss is nan on rank 0; updates left out in a row: 1, so"
    )
    assert "Traceback" not in output
