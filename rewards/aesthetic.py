"""Aesthetic reward: how good an image looks, scored by a small head over CLIP (M3.8 f).

`rewards.aesthetic_head` describes the files in its folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepgen.config import InputPath, PoolSettings, setting
from rewards.base import RewardRequest

LOWEST, HIGHEST = 1.0, 10.0


class AestheticReward:
    """How good the image looks, 0..1, whatever the prompt asks for. The head's scale of 1..10 is mapped to 0..1.

    All rewards then share one scale, so weights mean the same for each of them even when rewards are summed before
    they are normalised (`grpo`). Scores outside 1..10 are clamped: the head was trained only on that range, and a
    policy that reaches 14 has found a flaw in the head.
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/aesthetic", "Folder of the aesthetic model.")

    def __init__(self, options: Options) -> None:
        from rewards.aesthetic_head import AestheticPredictor

        self.predictor = AestheticPredictor(options.path, options.batch_size, key=options.dotted("path"))

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score in 0..1 per request."""
        if not requests:
            return []
        raw = self.predictor.predict([request.image for request in requests])
        return [(min(max(value, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST) for value in raw]
