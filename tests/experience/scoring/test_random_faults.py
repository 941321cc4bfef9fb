"""Random faults in one call of five: nothing is invented or counted twice; the gradient is that of the rest."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch

from actors.experience.scoring.pool_parts import RewardScores
from actors.experience.scoring.reward_pool import RewardPool
from deepgen.algorithms.advantages import group_advantages
from deepgen.algorithms.losses import clipped_policy_loss
from rewards import Missing, RewardUnavailable, Score
from tests.helpers.local_replicas import Death, Hang, Script, ask, in_pool, script

__all__ = ["script"]

GROUPS, SIZE = 625, 8  # for each of two rewards: 10,000 scores
POISON = 7  # one request in so many hundred breaks its batch, always


def truth(reward: int, group: int, image: int) -> float:
    """What a reward thinks of an image: a number of its own for each, on a scale of its own."""
    return (reward * 99 + 1) * (np.sin(group * 12.9898 + image * 78.233 + reward) + 2)


class Faults:
    """A reward of which each fifth call fails, in one of the ways in which they do, and which counts its answers."""

    def __init__(self, reward: int) -> None:
        self.reward, self.random, self.answered = reward, random.Random(reward), Counter[str]()

    def score(self, names: list[str]) -> list[Score]:
        if any(int(name.replace("-", "")) % 1999 == POISON for name in names):
            raise Death
        mishap = self.random.random()
        if mishap < 0.07:
            raise RewardUnavailable("refused")
        if mishap < 0.11:
            raise Death
        if mishap < 0.12:
            raise Hang
        scores: list[Score] = [truth(self.reward, *(int(number) for number in name.split("-"))) for name in names]
        if mishap < 0.20:
            odd: list[Score] = [None, Missing("too_long"), Missing("parse", "no digit"), float("nan")]
            scores[self.random.randrange(len(scores))] = self.random.choice(odd)
        self.answered.update(names)
        return scores


def faulty_scores(script: Script, reward: int) -> np.ndarray:
    """Scores [GROUPS, SIZE] of a pool of such a reward, NaN for missing, after checking what the pool says of them."""
    faults = Faults(reward)
    script.score = faults.score

    async def work(pool: RewardPool) -> tuple[list[RewardScores], dict[str, float]]:
        names = [[f"{group}-{image}" for image in range(SIZE)] for group in range(GROUPS)]
        return await asyncio.gather(*(ask(pool, group) for group in names)), pool.counters()

    found, totals = in_pool(work, batch_size=20, deadline_s=0.05, retries=1, replicas=2)
    values = [value for scores in found for value in scores.values]
    reasons = [reason.reason for scores in found for reason in scores.reasons if reason is not None]
    assert len(values) == GROUPS * SIZE
    assert values.count(None) == len(reasons) == totals["missing"] == sum(s.counters["missing"] for s in found)
    assert {f"missing/{reason}": count for reason, count in Counter(reasons).items()} == {
        key: count for key, count in totals.items() if key.startswith("missing/") and count
    }
    assert len(set(reasons)) >= 4
    assert max(faults.answered.values()) == 1  # an answer that arrived is never asked for again
    assert sum(faults.answered.values()) >= len(values) - len(reasons)
    scores = np.array(values, dtype=np.float64).reshape(GROUPS, SIZE)
    wanted = np.array([[truth(reward, group, image) for image in range(SIZE)] for group in range(GROUPS)])
    assert np.array_equal(scores[~np.isnan(scores)], wanted[~np.isnan(scores)])  # nothing is invented
    return scores


def offline(scores: np.ndarray, weights: tuple[float, float]) -> dict[tuple[int, int], float]:
    """Advantages by (group, image) of the samples that have a score which can be compared, by the formula of M3.5."""
    parts: dict[tuple[int, int], float] = {}
    for group in range(GROUPS):
        for reward, weight in enumerate(weights):
            there = [(image, scores[group, image, reward]) for image in range(SIZE)]
            there = [(image, float(np.float32(value))) for image, value in there if not np.isnan(value)]
            if len(there) < 2:
                continue
            values = np.array([value for _, value in there])
            for image, value in there:
                part = weight * (value - values.mean()) / (values.std(ddof=1) + 1e-4)
                parts[group, image] = parts.get((group, image), 0.0) + part
    whole = np.array(list(parts.values()))
    return {at: float(np.clip((part - whole.mean()) / (whole.std(ddof=1) + 1e-4), -5, 5)) for at, part in parts.items()}


def test_ten_thousand_scores_with_faults_give_the_gradient_of_what_is_left(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    scores = np.stack([faulty_scores(script, reward) for reward in range(2)], axis=-1)
    scores[3, 1:, 0] = np.nan  # a group with a single score of a reward
    scores[4, :, :] = np.nan  # and one without any
    scores[5, 1:, :] = np.nan
    weights = (2.0, 1.0)
    rows = torch.from_numpy(scores.reshape(-1, 2))
    ids = torch.arange(GROUPS).repeat_interleave(SIZE)
    result = group_advantages("gdpo", rows, torch.tensor(weights).expand_as(rows), ids)
    left = offline(scores, weights)
    wanted = np.array([left.get((group, image), 0.0) for group in range(GROUPS) for image in range(SIZE)])
    np.testing.assert_allclose(result.advantages, wanted, atol=1e-5)
    assert result.missing.tolist() == np.isnan(scores).sum((0, 1)).tolist()
    assert not any(at in left for at in [(4, 0), (5, 0), (5, 1)]) and (3, 0) in left

    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(len(rows), 5, generator=generator)
    model = torch.zeros(5, requires_grad=True)
    log_prob = seen @ model
    clipped_policy_loss(log_prob, log_prob.detach(), result.advantages, 1e-4).loss.backward()
    survivors = [(group * SIZE + image, part) for (group, image), part in left.items()]
    gradient = -sum(part * seen[row].numpy().astype(np.float64) for row, part in survivors) / len(rows)
    assert model.grad is not None
    np.testing.assert_allclose(model.grad, gradient, atol=1e-6)


def test_the_weight_of_a_reward_does_not_grow_where_another_is_missing() -> None:
    rows = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 8.0], [4.0, 7.0]])
    alone = rows.clone()
    alone[:, 1] = torch.nan
    found = [
        group_advantages("gdpo", scores, torch.tensor([[0.7, 0.3]] * 4), torch.zeros(4), whiten="none").advantages
        for scores in (rows, alone)
    ]
    second = group_advantages("gdpo", rows[:, 1:], torch.full((4, 1), 0.3), torch.zeros(4), whiten="none").advantages
    torch.testing.assert_close(found[0] - found[1], second)
