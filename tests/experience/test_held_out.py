"""Rewards that are watched and never trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.experience.reward_requests import held_out_weights, reward_weights
from actors.experience.step_advantages import own_advantages, step_advantages
from actors.experience.step_metrics import group_agreement, held_out_metrics, step_metrics
from actors.messages import Group
from deepgen.config import Settings, UserError, load_settings
from deepgen.config.settings import TASKS
from deepgen.config.stage_rules import check_stage
from deepgen.data.records import Record
from deepgen.evaluation.results import Evaluation, evaluation_metrics
from rewards import RewardRequest
from tests.helpers.rl_world import make_records

NAMES = ("judge", "clip", "aesthetic")


def settings(*overrides: str) -> Settings:
    rows = [f"rewards.weights.{task}={{judge: 0.7, clip: 0.3}}" for task in TASKS]
    return load_settings(None, ["train.workers=1", *rows, "rewards.weights.held_out={aesthetic: 2}", *overrides])


def group(number: int, scores: np.ndarray) -> Group:
    record = Record(f"p-{number}", "t2i", "a thing", "", None, (), "")
    weights, held_out = np.array([0.7, 0.3, 0], np.float32), np.array([0, 0, 2], np.float32)
    filled: dict[str, Any] = {
        "reward_weights": weights,
        "held_out_weights": held_out,
        "scores": scores.astype(np.float32),
    }
    return replace(Group(number, 0, 0, record, 0), **filled)


def test_a_held_out_reward_scores_all_tasks_and_has_no_weight_in_training() -> None:
    rewards = settings().rewards
    assert rewards.used() == NAMES and rewards.held_out() == {"aesthetic": 2}
    for task in TASKS:
        record = Record("one", task, "a cup", "", None, (), "")
        request = RewardRequest("a cup", "", task, np.zeros((8, 8, 3), np.uint8))
        assert np.allclose(reward_weights(rewards, record, request, 0), [0.7, 0.3, 0])
        assert np.allclose(held_out_weights(rewards, request), [0, 0, 2])
    assert group(0, np.zeros((2, 3))).asked_weights.tolist() == pytest.approx([0.7, 0.3, 2])


def test_held_out_scores_change_no_advantage_and_no_trained_metric() -> None:
    rng = np.random.default_rng(0)
    scores, ours = rng.normal(size=(2, 4, 3)), settings()
    one = [group(number, rows) for number, rows in enumerate(scores)]
    scores[..., 2] = [[np.nan] * 4, [1e6] * 4]
    other = [group(number, rows) for number, rows in enumerate(scores)]
    results = [step_advantages(ours, groups) for groups in (one, other)]
    assert results[0].advantages.abs().min() > 0
    assert np.array_equal(results[0].advantages.numpy(), results[1].advantages.numpy())
    assert np.array_equal(own_advantages(ours, one[1]), own_advantages(ours, other[1]))
    logged = []
    for groups, result in zip((one, other), results, strict=True):
        weights = np.stack([g.reward_weights for g in groups])
        metrics, tally = step_metrics(groups, weights, NAMES, result)
        assert tally.keys() == {"judge", "clip"}
        logged.append(metrics)
    assert logged[0] == logged[1] and "reward/aesthetic" not in logged[0]


def test_they_are_logged_with_their_own_total_and_agreement() -> None:
    order = np.arange(4.0)
    scores = np.stack([order, -order, order**2], axis=1)
    scores[3, 2] = np.nan
    metrics = held_out_metrics([group(0, scores), group(1, scores)], NAMES)
    assert [metrics[f"reward_held_out/{name}"] for name in ("aesthetic", "total")] == pytest.approx([5 / 3, 5 / 3])
    assert metrics["reward_missing/aesthetic"] == 2 and metrics["reward_missing_share/aesthetic"] == 0.25
    assert metrics["agreement/judge/aesthetic"] == 1 and metrics["agreement/clip/aesthetic"] == -1
    plain = replace(group(0, scores), held_out_weights=None)
    assert held_out_metrics([plain], NAMES) == {}


def test_agreement_is_kendalls_rank_correlation_within_groups() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (5, 8)).astype(float), rng.normal(size=(5, 8))
    expected = np.mean([stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert group_agreement(a, b) == pytest.approx(expected)
    assert group_agreement(np.ones((2, 8)), b[:2]) is None


def test_evaluations_keep_them_out_of_the_total() -> None:
    records = tuple(make_records(2, "x"))
    scores = np.tile(np.array([0.5, 0.25, 9.0], np.float32), (2, 3, 1))
    weights, held_out = np.tile([1.0, 1.0, 0], (2, 1)), np.tile([0, 0, 2.0], (2, 1))
    found = Evaluation(records, (), NAMES, scores, weights, 0, held_out)
    assert evaluation_metrics(found) == {
        "eval/judge": 0.5,
        "eval/clip": 0.25,
        "eval/total": 0.375,
        "eval_held_out/aesthetic": 9,
        "eval_held_out/total": 9,
    }
    assert found.columns().keys() == set(NAMES) and found.sample_weights()[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards.weights.held_out.clip=1"], ["rewards.weights.held_out.clip: clip is trained on", "weights.t2i"]),
        (["rewards.weights.held_out.orc=1"], ["rewards.weights.held_out.orc: unknown reward"]),
        ([f"rewards.weights.{task}={{}}" for task in TASKS], ["rewards.weights: got no weight above 0"]),
        (["tracking.alarms={kl: [1, roll_back]}"], ["tracking.alarms.kl: got roll_back", "report or stop"]),
        (["tracking.alarms={kl: [1, halt]}"], ["tracking.alarms", "report or stop or roll_back"]),
        (
            ["tracking.alarms={hacking: [0.05, stop]}", "rewards.weights.held_out={}", "evaluation.every=0"],
            ["tracking.alarms.hacking: got stop without rewards.weights.held_out and evaluation.every"],
        ),
    ],
)
def test_what_does_not_work_is_said(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_stage(settings(*overrides), "rl")
    assert all(text in str(caught.value) for text in said) and "\n" not in str(caught.value)
