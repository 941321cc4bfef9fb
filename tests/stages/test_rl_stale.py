"""`stages/rl.py` one version off-policy: killed in the middle, it ends with the bits of a run that was not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.rl_world import make_world
from tests.stages.test_rl_loop import decided, finish, metrics, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = (
    "run.seed=7",
    "train.steps=4",
    "train.learning_rate=1e-3",
    "experience.max_staleness=1",
    "algorithm.kl=none",
    "algorithm.sft_coef=0",
    "evaluation.prompts=0",
)


def test_a_killed_stale_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Its checkpoint holds the version before, which drew the groups that were under way."""
    world = make_world(tmp_path)
    finish(start(world, "run.name=whole", *SETTINGS))

    killed, folder = start(world, "run.name=killed", *SETTINGS), world / "runs" / "killed"
    deadline = time.monotonic() + 800
    while not (folder / "checkpoints" / "step-000002" / "manifest.json").exists():
        assert killed.poll() is None, killed.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert (folder / "checkpoints" / "step-000002" / "policy1-0.safetensors").exists()
    assert "resuming after step 2 of 4" in finish(start(world, "run.name=killed", *SETTINGS, "--resume"))

    whole, resumed = metrics(world / "runs" / "whole"), metrics(folder)
    assert [whole[step]["policy/staleness_max"] for step in (1, 2, 3, 4)] == [0, 1, 1, 1]
    for step in (3, 4):
        assert decided(whole[step]) == decided(resumed[step])
    weights = [world / "runs" / name / "model" / "transformer" for name in ("whole", "killed")]
    one, other = ((path / "diffusion_pytorch_model.safetensors").read_bytes() for path in weights)
    assert one == other
