"""`stages/rl.py` on a narrow random model: rewards rise, and a killed run continues where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepgen.data.parquet import write_records
from deepgen.tracking.timeline import read_spans
from stages.rl_status import status_text
from tests.helpers.rl_world import PROMPTS, make_records, make_settings, make_world, overrides

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
# Metrics that differ between equal runs: times, and how busy actors and object store were.
TIMES = ("time/", "throughput/", "idle/", "pool/", "rollout/restarts", "object_store/", "alarm/object_store")


def start(world: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run in its own process group."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "rl_driver.py"), *overrides(world, *more)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=world, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output[-4000:]
    return output


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """All logged metrics, by step."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry: dict[str, Any] = json.loads(line)
        steps.setdefault(entry["step"], {}).update(entry["metrics"])
    return steps


def decided(entry: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if not key.startswith(TIMES)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A world with one unusable prompt and one unusable held-out record."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "runs").mkdir()
    shutil.copy(empty_database, folder / "runs" / "mlflow.db")
    for name, prefix, count in (("prompts", "rl", PROMPTS), ("heldout", "heldout", 3)):
        records = make_records(count, prefix)
        broken = replace(records[2], id="broken", references=(records[2].references[0][:40],))
        write_records(folder / f"{name}.parquet", [*records, broken])
    return folder


def test_it_learns_what_is_rewarded(world: Path) -> None:
    """Brightness of held-out images rises; the invariants hold; report, grid and records exist.

    The learner takes the groups one by one, and holds back what whitening scales (KL and auxiliary loss are not).
    """
    output = finish(
        start(
            world,
            "run.name=bright",
            "train.steps=8",
            "train.learning_rate=3e-3",
            "train.checkpoint_every=8",
            "train.ema_decay=0.5",
            "rollout.group_size=8",
            "algorithm.update_micro_batch=8",
            "algorithm.clip_range=0.2",
            "experience.overlap=on",
            *(f"rewards.weights.{task}={{aesthetic: 1.0}}" for task in ("t2i", "edit")),
            "rewards.weights.held_out={clip: 1.0}",
        )
    )
    folder = world / "runs" / "bright"
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}
    assert rows["aesthetic"]["difference"] > 0
    assert rows["aesthetic"]["low"] > 0
    assert "weighted total" in output
    assert "the learner starts on each group when it is scored" in output
    assert f"grid:   {folder / 'before-after.png'}" in output
    assert (folder / "before-after.png").stat().st_size > 1000
    assert (folder / "images" / "samples-000002.png").exists()
    assert (folder / "model" / "transformer" / "config.json").exists()

    steps = metrics(folder)
    for step in range(1, 9):  # one optimizer step per batch, so every update is the first on its samples
        assert abs(steps[step]["policy/ratio_mean"] - 1) < 1e-5
        assert steps[step]["policy/clip_share"] == 0
        assert steps[step]["policy/staleness_max"] == 0
        assert steps[step]["reward_missing/aesthetic"] == 0
        assert steps[step]["reward/total"] == pytest.approx(steps[step]["reward/aesthetic"])
    assert sum("reward_held_out/clip" in steps[step] for step in range(1, 9)) > 2  # it applies to some prompts only
    assert steps[0]["eval_held_out/clip"] != steps[8]["eval_held_out/clip"] and "eval/clip" not in steps[8]
    assert rows["clip"]["prompts"] and rows["weighted total"]["difference"] == rows["aesthetic"]["difference"]
    assert steps[1]["policy/kl"] < 1e-8 < steps[8]["policy/kl"]
    # Averaged weights lie between those at the start and at the end.
    assert steps[0]["eval/aesthetic"] < steps[8]["eval_ema/aesthetic"] < steps[8]["eval/aesthetic"]
    assert "averaged weights after: aesthetic " in output
    assert (folder / "model-ema" / "transformer" / "config.json").exists()
    assert (steps[0]["data/quarantined_prompts"], steps[0]["data/quarantined_heldout"]) == (1, 1)
    assert json.loads((folder / "quarantine-prompts.jsonl").read_text())["row"] == PROMPTS + 1
    assert (folder / "timeline.png").stat().st_size > 1000
    spans = {(span.role, span.what) for span in read_spans(folder)}
    assert spans >= {("rollout", "sample"), ("rollout", "fetch weights"), ("aesthetic", "score"), ("learner", "update")}
    assert "bright: ended" in status_text(make_settings(world), "bright")
    assert "idle/rollout" not in steps[1]  # there is no batch before the first
    for role in ("rollout", "aesthetic", "learner"):
        assert 0 <= steps[4][f"idle/{role}"] <= 1
    for name in ("loss/sft", "loss/policy", "advantage/std", "time/rollout_s", "time/update_s", "time/sync_s"):
        assert name in steps[4]


@pytest.mark.soak  # `tests/soak/test_kills.py` kills the driver of a run with the default loss
def test_a_killed_run_goes_on_as_if_it_had_not_been(world: Path) -> None:
    """This run uses the other policy loss, and rollouts that add no noise between steps."""
    settings = (
        "run.seed=5",
        "train.steps=4",
        "train.checkpoint_every=2",
        "train.learning_rate=1e-3",
        "algorithm.policy_loss=diffusion_nft",
        "rollout.sampler=ode",
        "rollout.same_noise=false",
    )
    finish(start(world, "run.name=whole", *settings))

    killed = start(world, "run.name=killed", *settings)
    folder = world / "runs" / "killed"
    deadline = time.monotonic() + 800
    while not (folder / "checkpoints" / "step-000002" / "manifest.json").exists():
        assert killed.poll() is None, killed.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (folder / "report.json").exists()
    output = finish(start(world, "run.name=killed", *settings, "--resume"))
    assert "resuming after step 2 of 4" in output

    whole, resumed = metrics(world / "runs" / "whole"), metrics(folder)
    assert whole[1]["policy/kl"] < 1e-8 < whole[4]["policy/kl"]
    for step in (3, 4):
        assert decided(whole[step]) == decided(resumed[step])
    scores = [json.loads((world / "runs" / name / "report.json").read_text())["rows"] for name in ("whole", "killed")]
    assert scores[0] == scores[1]
    weights = [world / "runs" / name / "model" / "transformer" for name in ("whole", "killed")]
    one, other = ((path / "diffusion_pytorch_model.safetensors").read_bytes() for path in weights)
    assert np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))
