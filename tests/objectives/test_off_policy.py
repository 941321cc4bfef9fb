"""Several updates on one batch and samples of an older policy: what the losses are taken against, and of what."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.experience.policy.policy_sampler import pack_samples, trained_steps
from actors.objectives.experience_source import RLBatch
from actors.objectives.mr_grpo import MRGRPO, split_batch
from actors.objectives.policy_losses import ClippedRatio, PolicyInvariantError, TransitionMicro
from deepgen.algorithms.losses import clipped_policy_loss, negative_aware_loss
from deepgen.config import UserError
from deepgen.data.loading.collate import MicroBatch
from deepgen.data.quarantine import BadRow
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.registry import POLICY_LOSSES
from tests.objectives.test_policy_losses import CONTEXT, Dit, make

STALE, FRESH = 2, 3  # versions of the policy that drew the samples, in step 3
DECOUPLED = "algorithm.decoupled_loss=true"


def scored(weight: float, micro: TransitionMicro, settings: Any) -> Tensor:
    """Log-probabilities [B] of a micro-batch under `Dit(weight)`, in which the tests move the policy."""
    with torch.no_grad():
        return ClippedRatio(settings)._score(Dit(weight), micro)[1]


def one_micro(*more: str, version: int, update: int, name: str = "clipped_ratio") -> tuple[Any, Any, Any]:
    """Settings, policy loss and the only micro-batch of a group whose step started with `Dit(0.6)`; 0.5 drew it."""
    settings, group, samples = make(name, "algorithm.kl=none", "algorithm.update_micro_batch=8", *more)
    term = POLICY_LOSSES[name](settings)
    (micro,) = term.micros(replace(group, version=version), samples, 3, 1.0, update)
    with torch.no_grad():
        return settings, term, term.at_start(Dit(0.6), micro, CONTEXT)


# -- behaviour, proximal and trained policy --------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "update"), [(STALE, 0), (STALE, 1), (FRESH, 1)])
def test_ratios_are_against_the_policy_that_drew_the_samples(version: int, update: int) -> None:
    settings, term, micro = one_micro(version=version, update=update)
    loss, _, metrics = term.loss(Dit(0.7), None, micro, CONTEXT)
    log_prob = scored(0.7, micro, settings)
    expected = clipped_policy_loss(log_prob, scored(0.5, micro, settings), micro.advantage, 1e-4)
    torch.testing.assert_close(loss, expected.loss)
    assert metrics["policy/ratio_deviation_max"] > 1e-3
    assert not any("importance" in key or "truncated" in key for key in metrics)


def test_decoupled_ratios_are_against_the_policy_that_the_step_started_from() -> None:
    settings, term, micro = one_micro(DECOUPLED, "algorithm.importance_cap=1", version=STALE, update=1)
    behaviour, proximal, now = (scored(weight, micro, settings) for weight in (0.5, 0.6, 0.7))
    torch.testing.assert_close(micro.proximal_log_prob, proximal)
    loss, _, metrics = term.loss(Dit(0.7), None, micro, CONTEXT)
    importance, ratio = (proximal - behaviour).exp(), (now - proximal).exp()
    clipped = torch.maximum(-micro.advantage * ratio, -micro.advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4))
    torch.testing.assert_close(loss, (importance.clamp(max=1.0) * clipped).mean())
    torch.testing.assert_close(metrics["policy/importance_mean"], importance.mean())
    torch.testing.assert_close(metrics["policy/importance_max"], importance.max())
    assert metrics["policy/importance_capped_share"] == (importance > 1).float().mean()


def test_the_first_update_needs_no_extra_forward_and_has_ratio_one() -> None:
    settings, term, micro = one_micro(DECOUPLED, version=STALE, update=0)
    assert micro.proximal_log_prob is None
    dit = Dit(0.6)
    loss, _, metrics = term.loss(dit, None, micro, CONTEXT)
    assert metrics["policy/ratio_deviation_max"] == metrics["policy/clip_share"] == 0
    assert metrics["policy/importance_max"] > 1
    importance = (scored(0.6, micro, settings) - scored(0.5, micro, settings)).exp()
    torch.testing.assert_close(loss, (-importance * micro.advantage).mean())
    loss.backward()
    assert dit.weight.grad


@pytest.mark.parametrize("update", [0, 1])
def test_decoupling_changes_nothing_where_the_step_started_from_the_policy_that_drew(update: int) -> None:
    results = []
    for more in ([], [DECOUPLED]):
        _, term, micro = one_micro(*more, version=FRESH, update=update)
        results.append(term.loss(Dit(0.5 + 0.1 * update), None, micro, CONTEXT))
        assert micro.proximal_log_prob is None
    assert results[0] == results[1]


@pytest.mark.parametrize(("version", "update", "checked"), [(FRESH, 0, True), (FRESH, 1, False), (STALE, 0, False)])
def test_the_ratio_has_to_be_one_only_on_policy(version: int, update: int, checked: bool) -> None:
    _, term, micro = one_micro(version=version, update=update)
    if not checked:
        term.loss(Dit(0.7), None, micro, CONTEXT)
        return
    with pytest.raises(PolicyInvariantError, match="step 3, on-policy: the probability ratio is off 1"):
        term.loss(Dit(0.7), None, micro, CONTEXT)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_kl_has_to_be_zero_only_before_the_first_update(name: str) -> None:
    settings, group, samples = make(name, "algorithm.update_micro_batch=8")
    context = replace(CONTEXT, step=0)
    for update in (1, 0):
        term = POLICY_LOSSES[name](settings)
        (micro,) = term.micros(replace(group, version=0), samples, 0, 1.0, update)
        if update:
            term.loss(Dit(0.5), Dit(0.4), micro, context)
        else:
            with pytest.raises(PolicyInvariantError, match="KL of the initial policy"):
                term.loss(Dit(0.5), Dit(0.4), micro, context)


@pytest.mark.parametrize("version", [STALE, FRESH])
@pytest.mark.parametrize("update", [0, 1])
def test_the_old_policy_of_diffusion_nft_is_the_one_that_the_step_started_from(version: int, update: int) -> None:
    _, term, micro = one_micro(version=version, update=update, name="diffusion_nft")
    weight = 0.6 + 0.1 * update  # the first update starts from 0.6, a later one may be elsewhere
    loss = term.loss(Dit(weight), None, micro, CONTEXT).policy
    v, v_old = weight * micro.x, 0.6 * micro.x
    expected = negative_aware_loss(v, v_old, micro.x, micro.x0, micro.sigma, micro.advantage, beta=1.0, clip=5.0)
    torch.testing.assert_close(loss, expected.loss)


# -- late steps ------------------------------------------------------------------------------------------------------


def lowest_kept() -> float:
    """A level between those at which the two trained steps of step 3 end."""
    settings, _, _ = make("clipped_ratio")
    ends = [float(rollout_sigmas(5)[step + 1]) for step in trained_steps(settings, 3)]
    return sum(ends) / 2


@pytest.mark.parametrize(("version", "update", "kept"), [(FRESH, 0, 8), (FRESH, 1, 4), (STALE, 0, 4), (STALE, 1, 4)])
def test_off_policy_samples_lose_their_late_steps(version: int, update: int, kept: int) -> None:
    level = lowest_kept()
    _, term, micro = one_micro(f"algorithm.off_policy_min_sigma={level}", version=version, update=update)
    assert len(micro.x) == kept
    assert (micro.sigma_next >= level).all() == (kept == 4)
    assert micro.share == pytest.approx(1) and micro.images == pytest.approx(4)  # the mean is over what is left
    _, _, whole = one_micro(version=version, update=update)
    rows = slice(None) if kept == 8 else whole.sigma_next >= level
    fields = ("x", "next_x", "sigma", "sigma_next", "old_log_prob", "advantage")
    masked = replace(whole, **{field: getattr(whole, field)[rows] for field in fields})
    gradients = []
    for part in (micro, masked):
        dit = Dit(0.5)
        loss, _, metrics = term.loss(dit, None, part, CONTEXT)
        loss.backward()
        gradients.append(dit.weight.grad)
        assert metrics.get("policy/truncated_share") == (0.5 if kept == 4 and part is micro else None)
    torch.testing.assert_close(*gradients)


def test_a_group_that_would_lose_all_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"off_policy_min_sigma: got 0\.999.*all trained steps of group 0 of step 3"):
        one_micro("algorithm.off_policy_min_sigma=0.999", version=STALE, update=0)


# -- mini-batches ----------------------------------------------------------------------------------------------------


def rl_batch(*more: str, groups: int = 4) -> tuple[Any, RLBatch]:
    settings, group, samples = make("clipped_ratio", "algorithm.sft_coef=0", "algorithm.kl=none", *more)
    packed = pack_samples(samples)
    rows = [[1.0, -1.0, 0.5, -0.5], [2.0, -2.0, 1.0, -1.0], [0.3, -0.3, 0.1, -0.1], [-1.0, 1.0, 0.0, 0.0]]
    own = [
        replace(group, number=i, trajectory=packed, advantages=torch.tensor(rows[i]).numpy(), version=3)
        for i in range(groups)
    ]
    return settings, RLBatch(tuple(own), ())


def gradients(updates: int) -> list[Tensor]:
    """Gradient of every mini-batch, all at the weights that the step starts from."""
    settings, batch = rl_batch(f"algorithm.updates_per_batch={updates}")
    model: Any = SimpleNamespace(transformer=Dit(0.5))
    objective = MRGRPO(settings, None, None)
    with torch.no_grad():
        micros = objective.prepare(model, batch, CONTEXT)
    found = []
    for number, part in enumerate(objective.mini_batches(micros)):
        assert {micro.update for micro in part} == {number}
        assert sum(micro.share for micro in part) == pytest.approx(1)
        for micro in part:
            loss, _ = objective.loss(model, micro, CONTEXT)
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        found.append(model.transformer.weight.grad)
        model.transformer.weight.grad = None
    return found


def test_mini_batches_are_groups_in_order_each_with_its_own_mean() -> None:
    (whole,), halves, quarters = gradients(1), gradients(2), gradients(4)
    assert (len(halves), len(quarters)) == (2, 4)
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    for half, pair in zip(halves, (quarters[:2], quarters[2:]), strict=True):
        torch.testing.assert_close(torch.stack(pair).mean(), half)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="4 groups can't be split into 3"):
        list(split_batch(rl_batch()[1], 3))


def test_records_are_split_within_every_micro_batch() -> None:
    def micro(task: str, size: int) -> MicroBatch:
        rows: Any = list(range(size))
        return MicroBatch(task, tuple(rows), rows, rows, rows, tuple(rows), (BadRow("f", 0, "x", "y"),))

    batch = RLBatch(rl_batch()[1].groups, (micro("edit", 5), micro("t2i", 4)))
    one, two = split_batch(batch, 2)
    assert [(m.task, m.indices, m.seeds, len(m.bad)) for m in one.records + two.records] == [
        ("edit", (0, 1), (0, 1), 1),
        ("t2i", (0, 1), (0, 1), 1),
        ("edit", (2, 3, 4), (2, 3, 4), 0),
        ("t2i", (2, 3), (2, 3), 0),
    ]
    assert one.groups + two.groups == batch.groups
    assert list(split_batch(batch, 1)) == [batch]
