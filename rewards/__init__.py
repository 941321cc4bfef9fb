"""Rewards: one file each, with the reward's class and its options. Their names are in `deepgen.registry.REWARDS`."""

from __future__ import annotations

from deepgen.config import InputPath, PoolSettings, setting
from rewards.base import Reward, RewardRequest, RewardUnavailable

__all__ = [
    "InputPath",
    "PoolSettings",
    "Reward",
    "RewardRequest",
    "RewardUnavailable",
    "applies",
    "build_reward",
    "setting",
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
