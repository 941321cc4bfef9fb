"""Rewards one can see, for RL tests. Light to import: reward actors load nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from rewards import REWARDS, RewardRequest


class Brightness:
    """Mean brightness of an image, 0 to 1. Stands in for the aesthetic reward."""

    name = "aesthetic"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls()

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        return True

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        return [float(request.image.mean()) / 255 for request in requests]


class Redness(Brightness):
    """Share of red, for prompts that speak of red only; refuses to score one particular prompt. Stands in for clip."""

    name = "clip"

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        return "red" in request.prompt

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        return [None if "unreadable" in r.prompt else float(r.image[..., 0].mean()) / 255 for r in requests]


def use_visible_rewards() -> None:
    """Register them in this process; the replicas get their import paths from here."""
    REWARDS["aesthetic"] = "tests.helpers.visible_rewards:Brightness"
    REWARDS["clip"] = "tests.helpers.visible_rewards:Redness"
