"""Rewards: one file each, with the reward's class and its options. Their names are in `deepgen.registry.REWARDS`."""

from __future__ import annotations

from deepgen.config import InputPath, PoolSettings, setting
from rewards.base import (
    REASONS,
    Missing,
    Reward,
    RewardBroken,
    RewardRequest,
    RewardUnavailable,
    Score,
    TextLimit,
    is_truth,
)

__all__ = [
    "REASONS",
    "InputPath",
    "Missing",
    "PoolSettings",
    "Reward",
    "RewardBroken",
    "RewardRequest",
    "RewardUnavailable",
    "Score",
    "TextLimit",
    "applies",
    "build_reward",
    "is_groupwise",
    "is_truth",
    "setting",
    "text_limit",
]


def build_reward(pool: PoolSettings) -> Reward:
    """Build a pool's reward in this process.

    Raises:
        UserError: a folder is missing, its weights are unusable, or the reward rejects its options.
    """
    reward = pool.reward_class()
    built: Reward = reward(pool) if hasattr(reward, "Options") else reward()
    return built


def applies(pool: PoolSettings, request: RewardRequest) -> bool:
    """Whether the pool's reward can score this request."""
    reward = pool.reward_class()
    return bool(reward.applies(request)) if hasattr(reward, "applies") else True


def is_groupwise(pool: PoolSettings) -> bool:
    """Whether the pool's reward compares the images of a prompt: it gets them together, in `score_groups`."""
    return hasattr(pool.reward_class(), "score_groups")


def text_limit(pool: PoolSettings) -> TextLimit | None:
    """How much text the pool's reward reads; None if it does not say."""
    reward = pool.reward_class()
    limit: TextLimit | None = reward.text_limit(pool) if hasattr(reward, "text_limit") else None
    return limit
