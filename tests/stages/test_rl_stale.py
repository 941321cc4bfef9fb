"""`stages/rl.py` one version off-policy: resumed from its middle, it ends with the bits of the undisturbed run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.rl_world import make_world
from tests.stages.test_rl_loop import decided, finish, metrics, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900)]
SETTINGS = (
    "run.seed=7",
    "train.steps=4",
    "train.learning_rate=1e-3",
    "experience.max_staleness=1",
    "algorithm.kl=none",
    "algorithm.sft_coef=0",
    "evaluation.prompts=0",
)


def test_a_stale_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Its checkpoint holds the version before, which drew the groups that were under way."""
    world = make_world(tmp_path)
    finish(start(world, "run.name=whole", *SETTINGS))
    whole, cut = world / "runs" / "whole", world / "runs" / "cut"
    shutil.copytree(whole / "checkpoints" / "step-000002", cut / "checkpoints" / "step-000002")
    assert (cut / "checkpoints" / "step-000002" / "policy1-0.safetensors").exists()
    assert "resuming after step 2 of 4" in finish(start(world, "run.name=cut", *SETTINGS, "--resume"))

    one, other = metrics(whole), metrics(cut)
    assert [one[step]["policy/staleness_max"] for step in (1, 2, 3, 4)] == [0, 1, 1, 1]
    for step in (3, 4):
        assert decided(one[step]) == decided(other[step])
    weights = [run / "model" / "transformer" / "diffusion_pytorch_model.safetensors" for run in (whole, cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
