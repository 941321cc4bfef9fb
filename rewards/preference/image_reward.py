"""ImageReward v1.0: how much people like a picture for its prompt (Xu et al. 2023, arXiv 2304.05977; M3.8 f).

`rewards.preference.blip_scorer` describes the files in its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepgen.config import InputPath, PoolSettings, Share, setting
from rewards.base import RewardRequest, Score, TextLimit
from rewards.clip import ClipReward

TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # the project's constants


class ImageReward:
    """(Raw score - mean) / standard deviation, with the project's constants: mostly -2.5..2.5, higher is better."""

    class Options(PoolSettings):
        path: InputPath = setting(
            "weights/image_reward", "Folder with ImageReward.pt, med_config.json and BERT's tokenizer.json."
        )
        gpus: Share = setting(0.1, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")

    def __init__(self, options: Options) -> None:
        from rewards.preference.blip_scorer import BlipScorer

        self.scorer = BlipScorer(options.path, TOKENS, options.batch_size, key=options.dotted("path"))

    applies = staticmethod(ClipReward.applies)

    @staticmethod
    def text_limit(options: Options) -> TextLimit:
        """35 tokens, among them one for the start and one for the end."""
        return TextLimit(Path(options.path), TOKENS, "does not read their end")

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One score for each request."""
        raw = self.scorer.raw_scores([r.image for r in requests], [r.target for r in requests])
        return [(value - MEAN) / STD for value in raw]
