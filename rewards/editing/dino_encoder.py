"""A DINOv2 that turns images into features of their patches (Oquab et al. 2023, arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from rewards.base import existing_folder
from rewards.published_weights import load_model, model_config

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCHES = 16  # along each side: 224 pixels with the published patches of 14


def squeeze(image: np.ndarray, size: int) -> Tensor:
    """One uint8 [H, W, 3] image as input: resized to [3, size, size] (bicubic), ImageNet's mean and deviation.

    The published processor resizes the shorter side and crops the centre. Here the whole picture counts, so its sides
    are resized alike: the same place in two pictures is the same place in both inputs, even if one is wider.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # copy: arrays from Ray are read-only
    if pixels.shape[1:] != (size, size):
        pixels = interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 255)
    return (pixels / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


class DinoEncoder:
    """A DINOv2, loaded from a folder in transformers' layout (facebook/dinov2-base: config.json, model.safetensors).

    Args:
        path: the folder.
        batch_size: images per forward pass.
        key: setting that error messages name, such as rewards.kept.path.

    Raises:
        UserError: the folder is missing, is no DINOv2, or its weights do not fit its config.
    """

    def __init__(self, path: str | Path, batch_size: int = 64, *, key: str) -> None:
        from transformers import Dinov2Model

        folder = existing_folder(key, path, "config.json")
        config = model_config(folder, "dinov2", key=key)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self.model = load_model(Dinov2Model, config, folder, key=key).to(self.device)

    @torch.inference_mode()
    def embed_patches(self, images: Sequence[np.ndarray]) -> Tensor:
        """Features of the 16 x 16 patches of B uint8 [H, W, 3] images: float32 [B, 256, D] on the CPU, unit length."""
        size = PATCHES * int(self.model.config.patch_size)
        features = []
        for start in range(0, len(images), self.batch_size):
            batch = [squeeze(image, size) for image in images[start : start + self.batch_size]]
            output = self.model(pixel_values=torch.stack(batch).to(self.device))
            features.append(output.last_hidden_state[:, 1:].cpu())  # without the token of the whole image
        return normalize(torch.cat(features), dim=-1)
