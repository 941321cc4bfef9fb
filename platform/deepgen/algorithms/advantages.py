"""Advantages: how much better a sample is than its siblings, from several rewards with different scales (M3.5).

The default, GDPO, normalises every reward inside its group *before* adding them up with the prompt's weights. Adding
raw rewards first (GRPO) lets the reward with the widest scale decide; normalising first lets the weights decide.

A missing score is NaN. Means and spreads leave it out, and it counts as "average": it adds 0 to the normalised sum, or
its group's mean to a raw sum. The other weights are not scaled up to make up for it, so a sample is not pushed harder
because a judge was away. A sample without any score gets advantage 0 and is left out of the batch statistics. Where
scores of a reward are missing in a group and fewer than MIN_SCORES are left, the group learns nothing from that reward:
a score that is alone has nothing to be compared with. In the loss an advantage of 0 is a mask: the sample adds nothing
to the policy gradient, and the mean stays one over all samples, so that the others are not pushed harder. A score with
weight 0 has no effect and does not count as missing.

All functions are pure. Statistics are in fp64, with the sample standard deviation (n - 1) and eps outside the root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepgen.algorithms.rules import WHITEN
from deepgen.errors import UserError
from deepgen.registry import ADVANTAGES, lookup

MIN_SCORES = 2  # of a reward in a group in which others are missing; with fewer they count as missing, too


Method = Callable[["Scores"], tuple[Tensor, Tensor]]  # -> combined signal [N], advantages [N]


@dataclass(frozen=True)
class AdvantageResult:
    advantages: Tensor  # [N] fp32, clipped
    zero_spread: Tensor  # [K] fp32, share of the groups using this reward that learned nothing from it
    missing: Tensor  # [K] int, missing scores among those asked for (weight > 0)
    spread_before: float  # standard deviation of the combined signal before the batch-wide normalisation
    spread_after: float  # standard deviation of the final advantages
    factor: float  # what whitening multiplies a group's own part with, see `choose_overlap`
    signal: Signal  # what the advantages were made of, for `reward_shares`


@dataclass(frozen=True)
class Scores:
    """A batch of N samples with K rewards, checked and in fp64."""

    rewards: Tensor  # [N, K], 0 where not present
    present: Tensor  # [N, K] bool
    weights: Tensor  # [N, K]
    groups: Tensor  # [N] int, 0..G-1
    scope: Tensor | None  # [N] int, equal for samples that share the batch-wide part; None: no such part
    eps: float

    @property
    def usable(self) -> Tensor:
        """[N] bool: samples with at least one score that counts."""
        return (self.present & (self.weights != 0)).any(dim=1)


@dataclass(frozen=True)
class Signal:
    """What a method has made of the scores."""

    method: Method
    scores: Scores  # without those that were alone in a group
    combined: Tensor  # [N] fp64
    advantages: Tensor  # [N] fp64, before the clip


def group_advantages(
    name: str,
    rewards: Tensor,
    weights: Tensor,
    group_ids: Tensor,
    *,
    eps: float = 1e-4,
    whiten: str = "global",
    rank_ids: Tensor | None = None,
    clip: float | None = 5.0,
) -> AdvantageResult:
    """Advantages of N samples by the method called `name` (a key of `ADVANTAGES`, or the import path of your own).

    rewards: [N, K], NaN for missing. weights: [N, K], the prompt's weight of each reward.
    group_ids: [N], equal for samples of one group, in any order.
    whiten: scope of the batch-wide normalisation (a key of WHITEN); "rank" needs rank_ids [N].
    clip: bound on the size of an advantage, None for no bound.

    Raises UserError for an unknown name or scope, ValueError for shapes or values that don't fit.
    """
    method: Method = ADVANTAGES.load(name)
    scores = _checked(rewards, weights, group_ids, _scope(whiten, rewards, rank_ids), eps)
    _, flat = normalise(scores.rewards, scores.present, scores.groups, eps)
    compared = _without_lone_scores(scores)
    combined, whole = method(compared)
    advantages = torch.where(compared.usable, whole, 0.0)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    asked = scores.weights != 0
    spread = _spread(combined[compared.usable])
    return AdvantageResult(
        advantages=advantages.float(),
        zero_spread=_share_of_groups(flat, asked, scores.groups).float(),
        missing=(~scores.present & asked).sum(dim=0),
        spread_before=spread,
        spread_after=_spread(advantages[compared.usable]),
        factor=1 / (spread + eps),
        signal=Signal(method, compared, combined, whole),
    )


def reward_shares(signal: Signal) -> Tensor:
    """Which reward moves the policy: its share of the advantages' differences within groups; [K] fp64, the sum is 1.

    A reward's part of the combined signal is what the method makes of this reward alone. Advantages of a group differ
    as its combined signal does, times a factor; the same factor makes the part comparable between groups. Share:
    covariance of part and advantage within groups, divided by the sum over the rewards. Of uncorrelated rewards each
    has the square of what it adds (gdpo: of its weight). It is negative for a reward against which the others decide,
    and NaN where no group has differences.
    """
    scores = signal.scores
    moved, whole = (_within_groups(values, scores) for values in (signal.advantages, signal.combined))
    factor = _of_groups(moved * whole, scores) / _of_groups(whole**2, scores)
    factor = torch.where(factor.isfinite(), factor, 0.0)
    shares = torch.zeros(scores.weights.shape[1], dtype=torch.float64, device=scores.weights.device)
    for k in (scores.weights != 0).any(dim=0).nonzero()[:, 0].tolist():
        alone = torch.zeros_like(scores.weights)
        alone[:, k] = scores.weights[:, k]
        part, _ = signal.method(replace(scores, weights=alone))
        shares[k] = (factor * _within_groups(part, scores) * moved).sum()
    total = shares.sum()
    return shares / total if total > 0 else torch.full_like(shares, torch.nan)


# -- the methods: Scores -> (combined signal [N], advantages [N]) ----------------------------------


def gdpo(scores: Scores) -> tuple[Tensor, Tensor]:
    """Paper Eq. 2: normalise each reward in its group, add them up with the weights, then whiten over the batch."""
    normalised, _ = normalise(scores.rewards, scores.present, scores.groups, scores.eps)
    combined = (scores.weights * normalised).sum(dim=1)
    if scores.scope is None:
        return combined, combined
    return combined, normalise(combined, scores.usable, scores.scope, scores.eps)[0]


def grpo(scores: Scores) -> tuple[Tensor, Tensor]:
    """Weighted raw sum, normalised within its group. There is no batch-wide part."""
    total = weighted_total(scores)
    return total, normalise(total, scores.usable, scores.groups, scores.eps)[0]


def grpo_global_std(scores: Scores) -> tuple[Tensor, Tensor]:
    """Weighted raw sum minus its group's mean, divided by the spread of the batch: easy prompts are not inflated."""
    total = weighted_total(scores)
    group_mean, _, _ = _statistics(total, scores.usable, scores.groups)
    _, batch_std, _ = _statistics(total, scores.usable, _required(scores, "grpo_global_std"))
    return total, (total - group_mean) / (batch_std + scores.eps)


def reinforcepp(scores: Scores) -> tuple[Tensor, Tensor]:
    """REINFORCE++: weighted raw sum, normalised over the batch. Groups do not matter."""
    total = weighted_total(scores)
    return total, normalise(total, scores.usable, _required(scores, "reinforcepp"), scores.eps)[0]


# -- parts -----------------------------------------------------------------------------------------


def normalise(values: Tensor, present: Tensor, ids: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the present values that share an id to (values - mean) / (std + eps), and say where that is impossible.

    values, present: [N] or [N, K]; ids [N]. Returns two tensors of the shape of values: the normalised values, 0 where
    not present; and True where fewer than two values, or only equal ones, share the id (normalised to exactly 0).
    """
    mean, std, count = _statistics(values, present, ids)
    flat = (count < 2) | (std == 0)
    return torch.where(present & ~flat, (values - mean) / (std + eps), 0.0), flat


def weighted_total(scores: Scores) -> Tensor:
    """Sum of weight * reward [N]. A missing score becomes its group's mean, or the batch's if the group has none."""
    group_mean, _, count = _statistics(scores.rewards, scores.present, scores.groups)
    batch_mean, _, _ = _statistics(scores.rewards, scores.present, torch.zeros_like(scores.groups))
    stand_in = torch.where(count > 0, group_mean, batch_mean)
    return (scores.weights * torch.where(scores.present, scores.rewards, stand_in)).sum(dim=1)


def _without_lone_scores(scores: Scores) -> Scores:
    """The scores, without those of a reward in a group that has lost so many that too few are left."""
    asked = scores.weights != 0
    _, _, count = _statistics(scores.rewards, scores.present & asked, scores.groups)
    _, _, lost = _statistics(scores.rewards, ~scores.present & asked, scores.groups)
    lone = asked & (count < MIN_SCORES) & (lost > 0)
    if not lone.any():
        return scores
    return replace(scores, present=scores.present & ~lone, rewards=torch.where(lone, 0.0, scores.rewards))


def _statistics(values: Tensor, present: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sample standard deviation and count of the present values that share an id, repeated for every row.

    In fp64, equal fp32 values have exactly their own mean, so `std == 0` finds a group without spread.
    """

    def total(rows: Tensor) -> Tensor:
        sums = rows.new_zeros(int(ids.max()) + 1, *rows.shape[1:])
        return sums.index_add(0, ids, rows)[ids]

    count = total(present.double())
    mean = total(torch.where(present, values, 0.0)) / count.clamp(min=1)
    squares = total(torch.where(present, (values - mean) ** 2, 0.0))
    return mean, torch.sqrt(squares / (count - 1).clamp(min=1)), count


def _within_groups(values: Tensor, scores: Scores) -> Tensor:
    """Values minus their group's mean [N], 0 for samples without any score."""
    mean, _, _ = _statistics(values, scores.usable, scores.groups)
    return torch.where(scores.usable, values - mean, 0.0)


def _of_groups(values: Tensor, scores: Scores) -> Tensor:
    """Each group's sum of the values, repeated for its samples; [N] -> [N]."""
    sums = values.new_zeros(int(scores.groups.max()) + 1).index_add(0, scores.groups, values)
    return sums[scores.groups]


def _share_of_groups(flat: Tensor, asked: Tensor, groups: Tensor) -> Tensor:
    """Share of groups with `flat` among those that asked for the reward; [N, K], [N, K], [N] -> [K]."""
    first_rows = torch.stack([(groups == g).nonzero()[0, 0] for g in range(int(groups.max()) + 1)])
    flat, asked = flat[first_rows], asked[first_rows]
    return (flat & asked).sum(dim=0) / asked.sum(dim=0).clamp(min=1)


def _numbered(ids: Tensor) -> Tensor:
    """Renumber any ids [N] to 0..count-1."""
    numbered: Tensor = torch.unique(ids, return_inverse=True)[1]
    return numbered


def _spread(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def _scope(whiten: str, rewards: Tensor, rank_ids: Tensor | None) -> Tensor | None:
    lookup(WHITEN, whiten, "algorithm.whiten")
    if whiten == "none":
        return None
    if whiten == "global":
        return torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
    if rank_ids is None or rank_ids.shape != rewards.shape[:1]:
        raise ValueError("whiten='rank' needs rank_ids, one per sample")
    return _numbered(rank_ids)


def _required(scores: Scores, name: str) -> Tensor:
    if scores.scope is None:
        raise UserError(f"algorithm.whiten: got 'none' with batch-wide advantage {name!r}; allowed: global, rank")
    return scores.scope


def _checked(rewards: Tensor, weights: Tensor, group_ids: Tensor, scope: Tensor | None, eps: float) -> Scores:
    if rewards.dim() != 2 or not len(rewards) or weights.shape != rewards.shape or group_ids.shape != rewards.shape[:1]:
        shapes = f"{list(rewards.shape)}, {list(weights.shape)}, {list(group_ids.shape)}"
        raise ValueError(f"rewards, weights, group_ids must be [N, K], [N, K], [N] with N > 0; got {shapes}")
    if rewards.isinf().any() or not weights.isfinite().all():
        raise ValueError("rewards must be finite or NaN (missing), weights finite")
    present = ~rewards.isnan()
    return Scores(
        rewards=torch.where(present, rewards, 0.0).float().double(),
        present=present,
        weights=weights.double(),
        groups=_numbered(group_ids),
        scope=scope,
        eps=eps,
    )
