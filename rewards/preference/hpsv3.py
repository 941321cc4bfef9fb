"""HPS v3: how well people like a picture for its prompt (Ma et al. 2025, arXiv 2508.03789).

`rewards.preference.qwen_scorer` describes the files in its folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepgen.config import InputPath, PoolSettings, Share, setting
from rewards.base import Missing, RewardRequest, Score, strip_fault
from rewards.clip import ClipReward

MAX_ASPECT = 200  # of Qwen2-VL's image processor


class HpsV3Reward:
    """The mean of the published score's normal distribution; its spread is left out, as in the project's examples."""

    class Options(PoolSettings):
        path: InputPath = setting("weights/hpsv3", "Folder of HPS v3 with the files of Qwen2-VL-7B-Instruct.")
        batch_size: int = setting(16, "Images in one call.", unit="images", ge=1)
        gpus: Share = setting(1.0, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")

    def __init__(self, options: Options) -> None:
        from rewards.preference.qwen_scorer import QwenScorer

        self.scorer = QwenScorer(options.path, key=options.dotted("path"))

    applies = staticmethod(ClipReward.applies)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One score for each request; `Missing` for a description with a token of the model's own, and for a strip."""
        scores: list[Score] = [self._fault(request) for request in requests]
        asked = [place for place, score in enumerate(scores) if score is None]
        if asked:
            images, texts = [requests[place].image for place in asked], [requests[place].target for place in asked]
            for place, score in zip(asked, self.scorer.scores(images, texts), strict=True):
                scores[place] = score
        return scores

    def _fault(self, request: RewardRequest) -> Missing | None:
        """Why the model cannot be asked; its processor would raise an error that costs the whole batch."""
        if token := self.scorer.reserved(request.target):
            return Missing("refused", f"a description contains the reserved token {token}")
        return strip_fault(request.image, MAX_ASPECT)
