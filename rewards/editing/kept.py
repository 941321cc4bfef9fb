"""What should stay stays: a DINOv2 compares result and source patch by patch, without the patches that changed most.

Nobody says which part of a picture an instruction means, and a mask guessed from the pictures would call everything
that changed wanted. So a share of the patches may change freely (`may_change`), and the others should be as before.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepgen.config import InputPath, PoolSettings, Share, setting
from rewards.base import RewardRequest, Score
from rewards.editing.sources import distinct_sources, is_edit


class KeptReward:
    """Mean cosine, -1..1, of the patches of result and (first) source, without the `may_change` that differ most.

    It is 1 for a result that equals its source, so it only makes sense beside a reward for the instruction.
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/dinov2", "Folder of a DINOv2 in transformers' layout.")
        may_change: float = setting(0.25, "Share of the patches that an edit may change at no cost.", ge=0, lt=1)
        gpus: Share = setting(0.1, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")

    def __init__(self, options: Options) -> None:
        from rewards.editing.dino_encoder import DinoEncoder

        self.encoder = DinoEncoder(options.path, options.batch_size, key=options.dotted("path"))
        self.may_change = options.may_change

    applies = staticmethod(is_edit)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One score for each request."""
        if not requests:
            return []
        results = self.encoder.embed_patches([request.image for request in requests])  # [B, P, D]
        sources, rows = distinct_sources(requests)
        cosines = (results * self.encoder.embed_patches(sources)[rows]).sum(-1)  # [B, P]
        stays = cosines.shape[1] - int(self.may_change * cosines.shape[1])
        means: list[float] = cosines.topk(stays, dim=1).values.mean(1).tolist()
        return means
