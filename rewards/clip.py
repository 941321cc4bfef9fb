"""CLIP reward: cosine similarity of image and description, raw and unscaled (M3.8 c)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deepgen.config import InputPath, PoolSettings, setting
from rewards.base import RewardRequest, Score, TextLimit

USUAL_TOKENS = 77  # a CLIP whose files give no other length


class ClipReward:
    """Cosine of image and description, -1..1 (a trained CLIP: about 0.2..0.35)."""

    class Options(PoolSettings):
        path: InputPath = setting("weights/clip", "Folder of the CLIP model.")

    def __init__(self, options: Options) -> None:
        from rewards.clip_encoder import ClipEncoder

        self.encoder = ClipEncoder(options.path, options.batch_size, key=options.dotted("path"))

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        """True when there are words to compare with."""
        return bool(request.target.strip())

    @staticmethod
    def text_limit(options: Options) -> TextLimit | None:
        """As in `ClipEncoder`, from files alone; None without them, which `ClipEncoder` reports."""
        return clip_text_limit(options.path)

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """Cosine of each image with its answer, or with its prompt if the answer is empty."""
        return self.encoder.similarities([r.image for r in requests], [r.target for r in requests])


def clip_text_limit(folder: Path) -> TextLimit | None:
    """How much text the CLIP in a folder reads, from its files alone; None if they are missing or damaged."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    if not (config.is_file() and tokenizer.is_file()):
        return None
    try:
        model, words = (json.loads(file.read_text(encoding="utf-8")) for file in (config, tokenizer))
        positions = (model.get("text_config") or {}).get("max_position_embeddings", USUAL_TOKENS)
        tokens = int(min(words.get("model_max_length", positions), positions))
    except (ValueError, TypeError, AttributeError):  # loading the model says what is wrong with them
        return None
    return TextLimit(folder, tokens, "does not read their end")
