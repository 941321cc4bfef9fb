"""Aesthetic reward: how good an image looks, by a small head over CLIP (M3.8 f).

What its folder holds is said in `rewards.aesthetic_head`.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepgen.config import InputPath, PoolSettings, setting
from rewards.base import RewardRequest

LOWEST, HIGHEST = 1.0, 10.0


class AestheticReward:
    """How good the image looks, 0..1, whatever the prompt asks for: the head's 1..10, stretched to the others' scale.

    Weights then mean the same for every reward, also where rewards are summed before they are normalised (`grpo`).
    Scores beyond the scale are cut: a head is only known to mean something where it was trained, and a policy that
    finds a way to 14 has found a hole in it.
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/aesthetic", "Folder of the aesthetic model.")

    def __init__(self, options: Options) -> None:
        from rewards.aesthetic_head import AestheticPredictor

        self.predictor = AestheticPredictor(options.path, options.batch_size, key=options.dotted("path"))

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score in 0..1 a request."""
        if not requests:
            return []
        raw = self.predictor.predict([request.image for request in requests])
        return [(min(max(value, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST) for value in raw]
