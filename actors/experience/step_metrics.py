"""Metrics of one step (names as in `deepgen.tracking`): rewards, advantages, and where the time went."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from actors.messages import Group
from deepgen.evaluation.results import weighted_total

if TYPE_CHECKING:
    from deepgen.algorithms.advantages import AdvantageResult

Tally = dict[str, tuple[int, int, float]]  # reward -> number of scores, number missing, sum of the scores


class StepClock:
    """Records when the groups of one step begin, are sampled and are scored, in seconds of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.sampled_groups = self.scored_groups = 0
        self._first_begun, self._last_sampled, self._last_scored = math.inf, -math.inf, -math.inf

    def begun(self) -> None:
        self._first_begun = min(self._first_begun, self._clock())

    def sampled(self) -> None:
        self._last_sampled = self._clock()
        self.sampled_groups += 1

    def scored(self) -> None:
        self._last_scored = self._clock()
        self.scored_groups += 1

    def metrics(self, images: int) -> dict[str, float]:
        """Seconds of sampling, seconds of scoring after the last group was sampled, and sampled images per second."""
        rollout_s = self._last_sampled - self._first_begun
        return {
            "time/rollout_s": rollout_s,
            "time/reward_s": self._last_scored - self._last_sampled,
            "throughput/rollout_images_per_s": images / rollout_s,
        }


def stacked_scores(groups: Sequence[Group]) -> np.ndarray:
    """Scores of scored groups, float32 [groups, G, K]."""
    return np.stack([group.scores for group in groups])


def group_diversity(final: np.ndarray) -> float | None:
    """Mean over all pairs of a group's images of the root mean square difference of their latents `final` [G, ...].

    None for a group of one.
    """
    flat = final.reshape(len(final), -1).astype(np.float64)
    apart = [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in combinations(flat, 2)]
    return sum(apart) / len(apart) if apart else None


def mean_spread(scores: np.ndarray) -> float | None:
    """Mean over groups of the sample standard deviation of a reward's scores [groups, G]; NaN is missing.

    Groups with fewer than two scores are left out; None if there is no other.
    """
    found = [row[np.isfinite(row)].astype(np.float64) for row in scores]
    spreads = [float(row.std(ddof=1)) for row in found if len(row) > 1]
    return sum(spreads) / len(spreads) if spreads else None


def step_metrics(
    groups: Sequence[Group],
    reward_weights: np.ndarray,
    names: Sequence[str],
    result: AdvantageResult,
) -> tuple[dict[str, float], Tally]:
    """Metrics of a step, and its contribution to the run's reward statistics.

    reward_weights: [groups, K], 0 where a prompt does not use a reward. names: names of the K rewards.
    """
    from deepgen.algorithms.advantages import reward_shares

    shares = reward_shares(result.signal)
    by_group = stacked_scores(groups)  # [groups, G, K]
    scores = by_group.reshape(-1, len(names))  # [N, K]
    weights = np.repeat(reward_weights, by_group.shape[1], axis=0)
    metrics = {
        "advantage/std": result.spread_after,
        "policy/staleness_max": float(max(group.step - (group.version or 0) for group in groups)),
    }
    apart = [group.diversity for group in groups if group.diversity is not None]
    if apart:
        metrics["rollout/diversity"] = sum(apart) / len(apart)
    total = weighted_total(scores, weights)
    if np.isfinite(total).any():
        metrics["reward/total"] = float(np.nanmean(total))
    tally: Tally = {}
    for k, name in enumerate(names):
        asked = weights[:, k] > 0
        had = asked & np.isfinite(scores[:, k])
        if not asked.any():
            continue  # no prompt of this step uses this reward
        tally[name] = int(had.sum()), int(asked.sum() - had.sum()), float(scores[had, k].sum())
        metrics[f"reward_missing/{name}"] = float(tally[name][1])
        metrics[f"reward_missing_share/{name}"] = float(tally[name][1] / asked.sum())
        metrics[f"reward_weight/{name}"] = float(weights[asked, k].mean())
        metrics[f"advantage/zero_spread/{name}"] = float(result.zero_spread[k])
        if had.any():
            metrics[f"reward/{name}"] = float(scores[had, k].mean())
            if (spread := mean_spread(by_group[:, :, k])) is not None:
                metrics[f"reward_spread/{name}"] = spread
            if shares[k].isfinite():
                metrics[f"advantage/share/{name}"] = float(shares[k])
    return metrics, tally


def held_out_metrics(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """Metrics of the rewards that are watched and not trained on, and how far the trained ones agree with them."""
    if all(group.held_out_weights is None or not group.held_out_weights.any() for group in groups):
        return {}
    weights = np.stack([group.held_out_weights for group in groups])  # [groups, K]
    trained = np.stack([group.reward_weights for group in groups]) > 0
    scores = stacked_scores(groups)
    rows = scores.reshape(-1, len(names))
    metrics = dict[str, float]()
    total = weighted_total(rows, np.repeat(weights, scores.shape[1], axis=0))
    if np.isfinite(total).any():
        metrics["reward_held_out/total"] = float(np.nanmean(total))
    for k, name in enumerate(names):
        own = scores[weights[:, k] > 0, :, k]
        if not own.size:
            continue
        metrics[f"reward_missing/{name}"] = float(np.isnan(own).sum())
        metrics[f"reward_missing_share/{name}"] = float(np.isnan(own).mean())
        if np.isfinite(own).any():
            metrics[f"reward_held_out/{name}"] = float(np.nanmean(own))
        for j, other in enumerate(names):
            both = (weights[:, k] > 0) & trained[:, j]
            agreement = group_agreement(scores[both, :, j], scores[both, :, k])
            if agreement is not None:
                metrics[f"agreement/{other}/{name}"] = agreement
    return metrics


def group_agreement(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean over groups of Kendall's rank correlation (tau-b) of two rewards' scores [groups, G].

    A group counts if both rewards tell at least two of its images apart. None if there is no such group.
    """
    found = [tau for x, y in zip(a, b, strict=True) if (tau := _tau(x, y)) is not None]
    return sum(found) / len(found) if found else None


def _tau(x: np.ndarray, y: np.ndarray) -> float | None:
    from scipy.stats import kendalltau  # takes a second to import, and few runs have held-out rewards

    both = np.isfinite(x) & np.isfinite(y)
    tau = float(kendalltau(x[both], y[both]).statistic) if both.sum() > 1 else math.nan
    return None if math.isnan(tau) else tau
