"""Advantages: parity with the reference implementation, masks and invariants."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepgen.algorithms.advantages import (
    AdvantageResult,
    Scores,
    group_advantages,
    normalise,
    reward_shares,
    weighted_total,
)
from deepgen.errors import UserError
from deepgen.registry import ADVANTAGES

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "advantages.npz", allow_pickle=False)
NAN = float("nan")


def _batch(groups: int = 4, size: int = 6, rewards: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.arange(groups).repeat_interleave(size)
    scores = torch.randn(groups * size, rewards, generator=generator)
    return scores, torch.rand(groups, rewards, generator=generator)[ids], ids


def _one_group(columns: list[list[float]], weights: list[float], **options: Any) -> AdvantageResult:
    rewards = torch.tensor(columns).T
    ids = torch.zeros(len(rewards))
    return group_advantages("gdpo", rewards, torch.tensor(weights).expand_as(rewards), ids, **options)


def _normalised(result: AdvantageResult) -> Tensor:
    """Each reward normalised within its group, [N, K] fp32; NaN where missing."""
    scores = result.signal.scores
    values, _ = normalise(scores.rewards, scores.present, scores.groups, scores.eps)
    return torch.where(scores.present, values, torch.nan).float()


# -- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 6])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_match_the_reference(name: str, size: int) -> None:
    rewards = torch.from_numpy(GOLDEN[f"adv/G{size}/rewards"])
    ids = torch.arange(len(rewards)) // size
    weights = torch.from_numpy(GOLDEN[f"adv/G{size}/weights"])[ids]
    result = group_advantages(name, rewards, weights, ids, clip=None)
    np.testing.assert_allclose(result.advantages, GOLDEN[f"adv/G{size}/{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 6])
def test_weighted_total_matches_the_reference(size: int) -> None:
    rewards = torch.from_numpy(GOLDEN[f"adv/G{size}/rewards"]).double()
    ids = torch.arange(len(rewards)) // size
    weights = torch.from_numpy(GOLDEN[f"adv/G{size}/weights"]).double()[ids]
    scores = Scores(rewards, torch.ones_like(rewards, dtype=torch.bool), weights, ids, None, 1e-4)
    np.testing.assert_allclose(weighted_total(scores), GOLDEN[f"adv/G{size}/total"], rtol=1e-5, atol=1e-6)


def test_gdpo_by_hand() -> None:
    result = _one_group([[1.0, 2.0, 3.0]], [0.5], whiten="none")
    assert _normalised(result)[:, 0].tolist() == pytest.approx([-1, 0, 1], abs=2e-4)
    assert result.advantages.tolist() == pytest.approx([-0.5, 0, 0.5], abs=1e-4)


# -- invariances -----------------------------------------------------------------------------------


def test_gdpo_ignores_shift_and_scale_of_a_reward() -> None:
    rewards, weights, ids = _batch()
    plain = group_advantages("gdpo", rewards, weights, ids, eps=0.0)
    moved = group_advantages("gdpo", rewards * torch.tensor([100.0, 0.01, 1.0]) + 3, weights, ids, eps=0.0)
    torch.testing.assert_close(moved.advantages, plain.advantages, rtol=1e-3, atol=1e-4)


def test_gdpo_lets_weights_decide_where_grpo_lets_the_scale() -> None:
    rewards, _, ids = _batch(rewards=2)
    rewards, weights = rewards * torch.tensor([0.01, 1.0]), torch.tensor([1.0, 0.5]).expand_as(rewards)

    def pull(name: str) -> list[float]:
        advantages = group_advantages(name, rewards, weights, ids).advantages
        return [torch.corrcoef(torch.stack([advantages, rewards[:, k]]))[0, 1].item() for k in range(2)]

    assert pull("gdpo")[0] > pull("gdpo")[1]
    assert pull("grpo")[0] < pull("grpo")[1]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_order_of_samples_and_names_of_groups_do_not_matter(name: str) -> None:
    rewards, weights, ids = _batch()
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    plain = group_advantages(name, rewards, weights, ids)
    mixed = group_advantages(name, rewards[order], weights[order], 1000 - 7 * ids[order])
    torch.testing.assert_close(mixed.advantages, plain.advantages[order])


def test_global_whitening_gives_mean_zero_and_spread_one() -> None:
    result = group_advantages("gdpo", *_batch())
    assert result.advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert result.spread_after == pytest.approx(1, abs=1e-3)
    assert result.spread_before != pytest.approx(1, abs=1e-2)


def test_rank_whitening_equals_each_rank_alone() -> None:
    rewards, weights, ids = _batch()
    ranks = ids // 2
    together = group_advantages("gdpo", rewards, weights, ids, whiten="rank", rank_ids=ranks)
    for rank in (0, 1):
        rows = ranks == rank
        alone = group_advantages("gdpo", rewards[rows], weights[rows], ids[rows])
        torch.testing.assert_close(together.advantages[rows], alone.advantages)
    whole = group_advantages("gdpo", rewards, weights, ids)
    assert not torch.allclose(together.advantages, whole.advantages)


def test_clip_bounds_outliers() -> None:
    rewards = torch.zeros(200, 1)
    rewards[0] = 1
    arguments = (rewards, torch.ones_like(rewards), torch.zeros(200))
    assert group_advantages("gdpo", *arguments, clip=None).advantages.max() > 13
    assert group_advantages("gdpo", *arguments, clip=5.0).advantages.max() == 5


# -- missing scores --------------------------------------------------------------------------------


def test_missing_scores_leave_the_statistics_of_the_others_alone() -> None:
    masked = _one_group([[1.0, 2.0, 3.0, NAN]], [1.0], whiten="none")
    without = _one_group([[1.0, 2.0, 3.0]], [1.0], whiten="none")
    assert torch.equal(masked.advantages[:3], without.advantages)
    assert masked.advantages[3] == 0
    assert _normalised(masked)[3].isnan().all()
    assert not _normalised(masked)[:3].isnan().any()
    assert masked.missing.tolist() == [1]


def test_other_weights_are_not_scaled_up_for_a_missing_score() -> None:
    both = _one_group([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]], [0.75, 0.25], whiten="none")
    one = _one_group([[1.0, 2.0, 3.0], [NAN, 6.0, 7.0]], [0.75, 0.25], whiten="none")
    assert one.advantages[0].item() == pytest.approx(0.75 * _normalised(both)[0, 0].item())


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_sample_without_scores_gets_zero_and_moves_nobody(name: str) -> None:
    rewards, weights, ids = _batch()
    with_lost = group_advantages(
        name,
        torch.cat([rewards, torch.full((1, 3), NAN)]),
        torch.cat([weights, weights[-1:]]),
        torch.cat([ids, ids[-1:]]),
    )
    plain = group_advantages(name, rewards, weights, ids)
    torch.testing.assert_close(with_lost.advantages[:-1], plain.advantages)
    assert with_lost.advantages[-1] == 0
    assert with_lost.missing.tolist() == [1, 1, 1]
    assert with_lost.spread_after == pytest.approx(plain.spread_after)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_score_that_is_left_alone_moves_nobody(name: str) -> None:
    """A group that lost all but one score of its only reward is as if it had lost all."""
    rewards, weights, ids = _batch(rewards=1)
    rewards[:6] = NAN
    none_left = group_advantages(name, rewards, weights, ids)
    rewards[2] = 1000.0
    one_left = group_advantages(name, rewards, weights, ids)
    assert torch.equal(one_left.advantages, none_left.advantages)
    assert one_left.spread_after == none_left.spread_after and one_left.factor == none_left.factor
    assert (one_left.missing.tolist(), none_left.missing.tolist()) == ([5], [6])


def test_a_single_image_is_not_alone_because_others_are_missing() -> None:
    """REINFORCE++ needs no groups: with one image in each, each score counts."""
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    result = group_advantages("reinforcepp", rewards, torch.ones(3, 1), torch.arange(3))
    assert result.advantages[0] < 0 < result.advantages[2]


@pytest.mark.parametrize("name", ["grpo", "grpo_global_std"])
def test_in_a_raw_sum_a_missing_score_is_average_not_zero(name: str) -> None:
    rewards = torch.tensor([[10.0, 1.0], [11.0, 1.0], [12.0, 1.0], [NAN, 1.0]])
    result = group_advantages(name, rewards, torch.ones_like(rewards), torch.zeros(4))
    assert result.advantages[3].item() == pytest.approx(0, abs=1e-6)


def test_one_score_or_equal_scores_contribute_nothing_and_are_counted() -> None:
    rewards = torch.tensor([[1.0, 0.1, NAN], [2.0, 0.1, NAN], [3.0, 0.1, 0.4], [1.0, 0.3, 5.0], [2.0, 0.2, 6.0]])
    ids = torch.tensor([0, 0, 0, 1, 1])
    result = group_advantages("gdpo", rewards, torch.ones(5, 3), ids, whiten="none")
    assert result.zero_spread.tolist() == [0, 0.5, 0.5]
    assert _normalised(result)[:3, 1].tolist() == [0, 0, 0]
    assert _normalised(result)[2, 2].isnan()  # alone, so it counts as missing
    assert torch.equal(result.advantages[:3], _normalised(result)[:3, 0])


def test_equal_scores_are_recognised_whatever_their_binary_fraction() -> None:
    rewards = torch.full((7, 1), 0.1)
    result = group_advantages("gdpo", rewards, torch.ones_like(rewards), torch.zeros(7))
    assert result.zero_spread.tolist() == [1]
    assert torch.equal(result.advantages, torch.zeros(7))


def test_a_reward_with_weight_zero_is_not_missing() -> None:
    """OCR is never called for a prompt without quotes, so no score is missing."""
    rewards = torch.tensor([[1.0, NAN], [2.0, NAN], [1.0, 0.5], [2.0, NAN]])
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    result = group_advantages("gdpo", rewards, weights, torch.tensor([0, 0, 1, 1]))
    assert result.missing.tolist() == [0, 1]
    assert result.zero_spread.tolist() == [0, 1]  # one group asked for it, with a single score


@pytest.mark.parametrize("name", ADVANTAGES)
def test_nothing_to_learn_is_zero_never_nan(name: str) -> None:
    for rewards in (torch.full((4, 2), NAN), torch.full((4, 2), 3.0)):
        result = group_advantages(name, rewards, torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
        assert torch.equal(result.advantages, torch.zeros(4))
        assert result.spread_before == result.spread_after == 0


def test_half_precision_rewards_are_fine() -> None:
    rewards, weights, ids = _batch()
    result = group_advantages("gdpo", rewards.half(), weights.half(), ids)
    assert result.advantages.dtype == torch.float32


# -- bad input -------------------------------------------------------------------------------------


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"algorithm\.advantage: got 'gppo' .*allowed: gdpo, grpo, grpo_"):
        group_advantages("gppo", *_batch())
    with pytest.raises(UserError, match=r"algorithm\.whiten: got 'batch'; allowed: global, rank, none"):
        group_advantages("gdpo", *_batch(), whiten="batch")


@pytest.mark.parametrize("name", ["grpo_global_std", "reinforcepp"])
def test_batch_wide_methods_need_a_scope(name: str) -> None:
    with pytest.raises(UserError, match=r"algorithm\.whiten: got 'none' with batch-wide advantage"):
        group_advantages(name, *_batch(), whiten="none")


def test_misfitting_arguments() -> None:
    rewards, weights, ids = _batch()
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        group_advantages("gdpo", rewards, weights[:4], ids)
    with pytest.raises(ValueError, match="finite"):
        group_advantages("gdpo", rewards / 0, weights, ids)
    with pytest.raises(ValueError, match="rank_ids"):
        group_advantages("gdpo", rewards, weights, ids, whiten="rank")


# -- which reward moves the policy -----------------------------------------------------------------

# Two uncorrelated rewards, the second on a scale 100 times wider.
APART = torch.tensor([[0.0, 0.0], [0.0, 100.0], [1.0, 0.0], [1.0, 100.0]])


def _shares(name: str, rewards: Tensor, weights: list[float], ids: Tensor | None = None, **options: Any) -> list[float]:
    ids = torch.zeros(len(rewards)) if ids is None else ids
    result = group_advantages(name, rewards, torch.tensor(weights).expand_as(rewards), ids, **options)
    shares: list[float] = reward_shares(result.signal).tolist()
    return shares


def test_shares_by_hand() -> None:
    """At weights 2:1 each part has the square of its weight under gdpo, of weight times scale in a raw sum."""
    assert _shares("gdpo", APART, [2, 1], eps=0.0) == pytest.approx([4 / 5, 1 / 5])
    for name in ("grpo", "grpo_global_std", "reinforcepp"):
        assert _shares(name, APART, [2, 1]) == pytest.approx([4 / 10004, 10000 / 10004])


def test_a_reward_that_is_outvoted_has_a_negative_share() -> None:
    against = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # the first part is 2, the second -1, both together 1
    assert _shares("gdpo", against, [2, 1]) == pytest.approx([2, -1])


def test_shares_of_a_raw_sum_are_covariances_with_the_advantages() -> None:
    """Groups with other spreads count alike, as their advantages are equally large."""
    rewards, _, ids = _batch(rewards=2)
    rewards = rewards * (1 + 9 * (ids == 0))[:, None]
    advantages = group_advantages(
        "grpo", rewards, torch.ones_like(rewards), ids, eps=0.0, clip=None
    ).advantages.double()
    parts = torch.stack([_centred(rewards.double(), ids, g) / rewards[ids == g].sum(1).std() for g in range(4)]).sum(0)
    by_hand = (parts * advantages[:, None]).sum(0) / (advantages**2).sum()
    assert _shares("grpo", rewards, [1, 1], ids, eps=0.0) == pytest.approx(by_hand.tolist(), abs=1e-5)


def _centred(rewards: Tensor, ids: Tensor, group: int) -> Tensor:
    rows = (ids == group)[:, None]
    return torch.where(rows, rewards - rewards[ids == group].mean(dim=0), 0.0)


@pytest.mark.parametrize("name", [*ADVANTAGES, "examples.own_advantage.ranks:ranks"])
def test_shares_add_up_and_missing_scores_have_none(name: str) -> None:
    rewards, _, ids = _batch()
    rewards[:6, 2] = NAN  # nothing of this group
    rewards[7, 0] = NAN
    whole = reward_shares(group_advantages(name, rewards, torch.ones_like(rewards), ids).signal)
    assert whole.sum().item() == pytest.approx(1) and (whole > 0).all()
    rewards[:, 2] = NAN
    without = reward_shares(group_advantages(name, rewards, torch.ones_like(rewards), ids).signal)
    assert without.sum().item() == pytest.approx(1) and without[2].item() == pytest.approx(0, abs=1e-12)
    assert reward_shares(group_advantages(name, torch.zeros(24, 3), torch.ones(24, 3), ids).signal).isnan().all()
