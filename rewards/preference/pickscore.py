"""PickScore v1: which picture people would rather have for a prompt (Kirstain et al. 2023, arXiv 2305.01569; M3.8 f).

A CLIP ViT-H-14, fine-tuned on choices between two pictures. The softmax of two scores is the predicted share of people
who choose each. Its folder has the files of yuvalkirstain/PickScore_v1 and the tokenizer of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K (tokenizer.json, tokenizer_config.json).
"""

from __future__ import annotations

from collections.abc import Sequence

from deepgen.config import InputPath, PoolSettings, Share, setting
from rewards.base import RewardRequest, Score, TextLimit
from rewards.clip import ClipReward, clip_text_limit


class PickScoreReward:
    """exp(logit scale) times the cosine of image and description, as published: about 17..24 for drawn pictures.

    The reference divides by 26. A weight 26 times smaller is the same where raw rewards are summed, and `gdpo` divides
    by the spread anyway, so there is no option for it.
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/pickscore", "Folder of PickScore v1 with its tokenizer.")
        gpus: Share = setting(0.1, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")

    def __init__(self, options: Options) -> None:
        from rewards.clip_encoder import ClipEncoder

        self.encoder = ClipEncoder(options.path, options.batch_size, key=options.dotted("path"))
        self.scale = float(self.encoder.model.logit_scale.exp())

    applies = staticmethod(ClipReward.applies)

    @staticmethod
    def text_limit(options: Options) -> TextLimit | None:
        """As in `ClipEncoder`, from files alone; None without them, which `ClipEncoder` reports."""
        return clip_text_limit(options.path)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One score for each request."""
        cosines = self.encoder.similarities([r.image for r in requests], [r.target for r in requests])
        return [self.scale * cosine for cosine in cosines]
