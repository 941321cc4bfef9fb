"""Rewards that are visible in the image, for RL tests. The module is light, so reward actors load little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rewards import RewardRequest

HUGE = 2.0**100


class Brightness:
    """Mean brightness of an image, 0 to 1. Stands in for the aesthetic reward."""

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        return [float(request.image.mean()) / 255 for request in requests]


class Exploding(Brightness):
    """Brightness, but huge for prompts that ask for it."""

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        pairs = zip(requests, super().score(requests), strict=True)
        return [HUGE if "exploding" in request.prompt else value for request, value in pairs]


def exploding(scores: Any) -> Any:
    """An advantage that cannot cope with such a score: NaN."""
    from deepgen.algorithms.advantages import gdpo

    combined, advantages = gdpo(scores)
    return combined, advantages.masked_fill((scores.rewards == HUGE).any(dim=1), math.nan)


class Redness:
    """Share of red, only for prompts that mention red. Gives no score for one prompt. Stands in for clip."""

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        return "red" in request.prompt

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        return [None if "unreadable" in r.prompt else float(r.image[..., 0].mean()) / 255 for r in requests]
