"""Rewards by name. The registry holds import paths, so that listing rewards imports none of them.

To add one: write a module with a class that follows `rewards.base.Reward`, and name it here. Where a name is wanted,
the import path "module:Class" of a class that is not registered works too.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from deepgen.errors import UserError
from rewards.base import Reward, RewardRequest, RewardUnavailable

__all__ = ["REWARDS", "Reward", "RewardRequest", "RewardUnavailable", "build_reward", "reward_class", "reward_path"]

REWARDS: dict[str, str] = {
    "judge": "rewards.judge:JudgeReward",
    "ocr": "rewards.ocr:OcrReward",
    "clip": "rewards.clip:ClipReward",
    "aesthetic": "rewards.aesthetic:AestheticReward",
}


def reward_path(name: str) -> str:
    """The import path "module:Class" of a reward.

    Raises:
        UserError: no reward has this name.
    """
    if name not in REWARDS and ":" not in name:
        raise UserError(f"rewards: unknown reward {name!r}; known are {', '.join(sorted(REWARDS))}")
    return REWARDS.get(name, name)


def reward_class(name: str) -> type[Reward]:
    """The class of a reward; imports its module. Raises `UserError` when no reward has this name."""
    module, _, attribute = reward_path(name).partition(":")
    found: type[Reward] = getattr(importlib.import_module(module), attribute)
    return found


def build_reward(name: str, settings: Mapping[str, Any]) -> Reward:
    """Build a reward in this process.

    Args:
        name: a key of `REWARDS`, or "module:Class".
        settings: the reward's own settings (`path`, `batch_size`, where it has them); the pool's keys are ignored.

    Raises:
        UserError: unknown name, missing folder or unusable weights.
    """
    return reward_class(name).from_settings(settings)
