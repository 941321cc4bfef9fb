"""A CLIP that turns images and texts into features, for rewards and for programs that train a head on top of it.

The weights folder is a transformers folder (config.json, weights, tokenizer). Its tokenizer must end every text with
the token at which the text model pools; `ClipEncoder` checks this on loading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from deepgen.errors import UserError
from rewards.base import existing_folder
from rewards.published_weights import load_model, model_config

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Longest side, in shorter ones, that is resized. Of a longer picture only the middle of that length is: the square in
# the centre is all that the model sees, and a strip of 10,000 x 1 would take gigabytes at a height of 224.
LONGEST = 16


def preprocess(image: np.ndarray, size: int) -> Tensor:
    """One image as CLIP input: shorter side resized to `size` (bicubic), cropped to the centre square, normalised.

    Args:
        image: uint8 [H, W, 3], RGB.
        size: side of the model's input in pixels.

    Returns:
        float32 [3, size, size].
    """
    pixels = _pixels(_middle(image))
    height, width = pixels.shape[1:]
    if min(height, width) != size:
        # The longer side is cut to whole pixels, not rounded, as in CLIP's own processor.
        sides = (size * height // min(height, width), size * width // min(height, width))
        pixels = interpolate(pixels[None], sides, mode="bicubic", antialias=True)[0].clamp(0, 255)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return _normalised(pixels[:, top : top + size, left : left + size])


def preprocess_whole(image: np.ndarray, size: int) -> Tensor:
    """As `preprocess`, but the longer side is resized to `size` and black fills the square: nothing is cropped."""
    pixels = _pixels(image)
    height, width = pixels.shape[1:]
    if max(height, width) != size:
        scale = size / max(height, width)
        sides = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = interpolate(pixels[None], sides, mode="bicubic", antialias=True)[0]
    down, right = size - pixels.shape[1], size - pixels.shape[2]
    return _normalised(pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2)))


def _middle(image: np.ndarray) -> np.ndarray:
    """An image without the ends of a very long side: resized, a line of 1 x 4096 pixels would take gigabytes."""
    most = LONGEST * min(image.shape[:2])
    top, left = (max(0, side - most) // 2 for side in image.shape[:2])
    return image[top : top + most, left : left + most]


def _pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # copy: arrays from Ray are read-only


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


class ClipEncoder:
    """A CLIP, loaded from a folder, that returns normalised features.

    Args:
        path: transformers CLIP folder with its tokenizer inside.
        batch_size: images or texts per forward pass.
        key: setting that error messages name, such as rewards.clip.path.
        state: weights by transformers' names, for a CLIP whose weights are not in such a folder.
        prepare: turns an image into the model's input of a given side.

    Raises:
        UserError: the folder is missing, is not a CLIP, its weights do not fit its config, or its tokenizer the model.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 64,
        *,
        key: str = "CLIP folder",
        state: dict[str, Tensor] | None = None,
        prepare: Callable[[np.ndarray, int], Tensor] = preprocess,
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = existing_folder(key, path, "config.json", "tokenizer.json")
        config = model_config(folder, "clip", key=key)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size, self._prepare = batch_size, prepare
        self.model = load_model(CLIPModel, config, folder, key=key, state=state).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        text_config = config.text_config
        self.max_length = min(self.tokenizer.model_max_length, text_config.max_position_embeddings)
        self._check_pooling(text_config, folder, key)

    def _check_pooling(self, text_config: Any, folder: Path, key: str) -> None:
        """Check the end token. CLIP reads text features there, so with a missing or different token they are noise."""
        end = self.tokenizer.eos_token_id
        if end is None or self.tokenizer("a").input_ids[-1] != end:
            raise UserError(f"{key}: the tokenizer in {str(folder)!r} does not end texts with an end token")
        pooled = text_config.eos_token_id
        if pooled == 2:  # marks an old config in transformers: the model pools at the highest token id of the text
            pooled = text_config.vocab_size - 1
        if pooled != end:
            raise UserError(
                f"{key}: in {str(folder)!r} the model pools at token {pooled}, the tokenizer ends texts with {end}"
            )

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return int(self.model.config.vision_config.image_size)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Features of B uint8 [H, W, 3] images of any sizes: float32 [B, D] on the CPU, unit length."""
        features = []
        for start in range(0, len(images), self.batch_size):
            batch = [self._prepare(image, self.image_size) for image in images[start : start + self.batch_size]]
            pixels = torch.stack(batch).to(self.device)  # [b, 3, S, S]
            features.append(self.model.get_image_features(pixel_values=pixels).pooler_output.cpu())
        return normalize(torch.cat(features), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of B texts, truncated to the model's maximum length: float32 [B, D] on the CPU, unit length."""
        features = []
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            tokens = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
            output = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            features.append(output.pooler_output.cpu())
        return normalize(torch.cat(features), dim=-1)

    def similarities(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Cosine of each image with the text at the same place, -1..1."""
        if not images:
            return []
        # All samples of a group have the same description, so encode each distinct text once.
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        features = self.embed_texts(list(distinct))[[distinct[text] for text in texts]]  # [B, D]
        cosines: list[float] = (self.embed_images(images) * features).sum(-1).tolist()
        return cosines
