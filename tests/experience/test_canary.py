"""The canary: learner and actor score it alike, and it sees every tensor that a sample depends on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.experience.policy.canary import TOLERANCE, canary_log_prob, check_canary, take_canary
from actors.experience.policy.weight_sync import WeightsMismatchError
from actors.messages import Canary
from deepgen.config import load_settings
from deepgen.models.unified import UnifiedModel
from tests.helpers.factories import make_tiny_folder, make_tiny_model
from tests.helpers.publishing_ranks import publish_from_ranks

# Queries of the context's last attention: the block drops what they ask for (`context_pre_only`).
UNUSED = {f"attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")}
ROLLOUT = load_settings(None, []).rollout


@pytest.mark.processes
@pytest.mark.slow
def test_learner_and_actor_score_it_alike(tmp_path: Path) -> None:
    """Two ranks and threads against one, in a flat buffer or sharded, with autocast around it: the same bits."""
    folder, world = make_tiny_folder(tmp_path / "model"), 2
    cases = [(stage, precision) for stage in (1, 3) for precision in ("fp32", "bf16")]
    runs = [
        [f"model.weights={folder}", f"train.zero_stage={stage}", f"model.precision={precision}", "train.threads=2",
         f"train.workers={world}", "model.gradient_checkpointing=false"]
        for stage, precision in cases
    ]  # fmt: skip
    start = take_canary(UnifiedModel.from_folder(folder), ROLLOUT)
    for case, found in zip(cases, publish_from_ranks(tmp_path, world, runs), strict=True):
        model = UnifiedModel.from_folder(folder)
        parameters = dict(model.trainable_parameters("rl"))
        assert parameters.keys() == found["weights"].keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(found["weights"][name])
        here = take_canary(model, ROLLOUT)
        assert here.log_prob == found["log_prob"] != start.log_prob, case
        assert (here.kernels == found["kernels"]) == (case[0] < 3)  # DeepSpeed replaces `linear`
        assert found["untouched"], case


def test_it_sees_one_step_of_any_tensor_that_a_sample_depends_on() -> None:
    model = make_tiny_model().requires_grad_(False)
    generator, before, unseen = torch.Generator().manual_seed(1), canary_log_prob(model, ROLLOUT), set()
    for name, parameter in model.transformer.named_parameters():
        kept = parameter.clone()
        parameter.add_(4e-5 * torch.randn(parameter.shape, generator=generator).sign())
        if canary_log_prob(model, ROLLOUT) == before:
            unseen.add(name)
        parameter.copy_(kept)
    assert unseen == {f"transformer_blocks.1.{name}" for name in UNUSED}


@pytest.mark.parametrize("sampler", ["cps", "flow_sde", "dance_sde", "ode"])
def test_it_is_a_log_probability_of_the_runs_sampler(sampler: str) -> None:
    """Another model has another one; ode takes cps's."""
    rollout: Any = ROLLOUT.model_copy(update={"sampler": sampler})
    found = float(canary_log_prob(make_tiny_model(), rollout))
    assert math.isfinite(found) and found != canary_log_prob(make_tiny_model(1), rollout)
    assert (found == canary_log_prob(make_tiny_model(), ROLLOUT)) == (sampler in ("cps", "ode"))


def test_equal_kernels_must_agree_to_the_bit_and_others_nearly() -> None:
    learner = Canary(-2.5, "a")
    close = replace(learner, log_prob=-2.5 - 2 * TOLERANCE)
    check_canary(learner, learner, 3)
    for kernels in ("b", None):
        check_canary(replace(close, kernels=kernels), learner, 3)
    check_canary(replace(close, kernels=None), replace(learner, kernels=None), 3)
    wanted = (
        r"version 3: the learner's canary has log-probability -2.5, the rollout policy's -2.50002; allowed: the same"
    )
    with pytest.raises(WeightsMismatchError, match=wanted):
        check_canary(close, learner, 3)
    with pytest.raises(WeightsMismatchError, match="allowed: 3e-05 apart"):
        check_canary(Canary(-2.6, "b"), learner, 3)


@pytest.mark.parametrize("kernels", ["a", "b"])
@pytest.mark.parametrize("learner", [-2.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("here", [math.nan, math.inf, -math.inf, -1e30])
def test_nothing_that_is_no_number_passes(kernels: str, learner: float, here: float) -> None:
    with pytest.raises(WeightsMismatchError):
        check_canary(Canary(here, kernels), Canary(learner, "a"), 1)
