"""How an edit moved the picture, in the space of a CLIP: in the wanted direction, and not too far from its source.

Both rewards read the first source picture of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.clip_encoder import ClipEncoder

from deepgen.config import InputPath, PoolSettings, setting
from rewards.base import RewardRequest, Score, TextLimit
from rewards.clip import ClipReward, clip_text_limit
from rewards.editing.sources import distinct_sources, is_edit

STILL = 1e-3  # a change of unit-length features that is shorter has no direction worth the name


class ClipDirectionReward:
    """Cosine, -1..1, of the change from source to result and the change of words that describe them (Gal et al. 2022,
    arXiv 2108.00946; the directional similarity of InstructPix2Pix).

    Published figures have captions of both pictures. A record has only the result's (the answer; the instruction where
    that is empty), so `source_text` stands for the source's: the direction is that from any picture to the wanted one,
    not from this one. A result that equals its source has moved nowhere: 0.
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/clip", "Folder of the CLIP model.")
        source_text: str = setting("a photo", "Words for the source picture, whatever it shows.")

    def __init__(self, options: Options) -> None:
        from rewards.clip_encoder import ClipEncoder

        self.encoder = ClipEncoder(options.path, options.batch_size, key=options.dotted("path"))
        self.source_text = options.source_text

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        """True for an edit that comes with words."""
        return is_edit(request) and ClipReward.applies(request)

    @staticmethod
    def text_limit(options: Options) -> TextLimit | None:
        """As in `ClipEncoder`, from files alone; None without them, which `ClipEncoder` reports."""
        return clip_text_limit(options.path)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One cosine for each request."""
        from torch.nn.functional import cosine_similarity

        if not requests:
            return []
        texts = list(dict.fromkeys([self.source_text, *(request.target for request in requests)]))
        words = self.encoder.embed_texts(texts)
        wanted = words[[texts.index(request.target) for request in requests]] - words[0]  # [B, D]
        results, sources = _features(self.encoder, requests)
        cosines: list[float] = cosine_similarity(results - sources, wanted, eps=STILL).tolist()
        return cosines


class ClipSourceReward:
    """Cosine, -1..1, of result and source in a CLIP: does the picture still show the same things, wherever they are?

    It is highest for a result that equals its source, so it only makes sense beside a reward for the instruction.
    """

    class Options(PoolSettings):
        path: InputPath = setting("weights/clip", "Folder of the CLIP model.")

    def __init__(self, options: Options) -> None:
        from rewards.clip_encoder import ClipEncoder

        self.encoder = ClipEncoder(options.path, options.batch_size, key=options.dotted("path"))

    applies = staticmethod(is_edit)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One cosine for each request."""
        if not requests:
            return []
        results, sources = _features(self.encoder, requests)
        cosines: list[float] = (results * sources).sum(-1).tolist()
        return cosines


def _features(encoder: ClipEncoder, requests: Sequence[RewardRequest]) -> tuple[Tensor, Tensor]:
    """Features [B, D] of the results and of their sources."""
    sources, rows = distinct_sources(requests)
    return encoder.embed_images([request.image for request in requests]), encoder.embed_images(sources)[rows]
