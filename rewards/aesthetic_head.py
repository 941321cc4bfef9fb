"""The aesthetic reward's head: a few layers over unit-length CLIP image features, like LAION's predictor (M3.8 f).

Its folder holds `head.safetensors` and `config.json`. The config is {"clip": the CLIP's folder, relative to this one;
"in_features"; "hidden": widths of hidden layers, [] for LAION's linear head; "activation": "none" or "gelu"}.
LAION's MLP has no activations: {"in_features": 768, "hidden": [1024, 128, 64, 16], "activation": "none"}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepgen.errors import UserError
from rewards.base import existing_folder
from rewards.clip_encoder import ClipEncoder


class AestheticHead(nn.Module):
    """Features [B, in_features] (unit length) -> scores [B]."""

    def __init__(self, in_features: int = 768, hidden: Sequence[int] = (), activation: str = "none") -> None:
        super().__init__()
        if activation not in ("none", "gelu"):
            raise UserError(f"aesthetic head: activation is {activation!r}; allowed: none, gelu")
        self.config = {"in_features": in_features, "hidden": list(hidden), "activation": activation}
        widths = [in_features, *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation: nn.Module = nn.GELU() if activation == "gelu" else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> scores [B]. Training teaches the scale 1..10; nothing enforces it here."""
        for layer in self.layers[:-1]:
            features = self.activation(layer(features))
        scores: Tensor = self.layers[-1](features)
        return scores.squeeze(-1)

    def save(self, folder: Path, *, clip: str) -> None:
        """Write weights and config; `clip` is the CLIP folder relative to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, folder / "head.safetensors")
        (folder / "config.json").write_text(
            json.dumps({"clip": clip, **self.config}, indent=2) + "\n", encoding="utf-8"
        )


def load_head(path: str | Path, *, key: str = "aesthetic head") -> tuple[AestheticHead, Path]:
    """The head in a folder, and the folder of the CLIP it was trained on.

    key: setting that error messages name, such as rewards.aesthetic.path.

    Raises:
        UserError: a file is missing, or the weights do not fit the config.
    """
    folder = existing_folder(key, path, "head.safetensors", "config.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "clip" not in config:
        raise UserError(f'{key}: {str(folder / "config.json")!r} does not say which "clip" it uses')
    clip = (folder / config.pop("clip")).resolve()
    try:
        head = AestheticHead(**config)
        head.load_state_dict(load_file(folder / "head.safetensors"))
    except (TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: the head in {str(folder)!r} does not fit its config: {reason}") from error
    return head.eval().requires_grad_(False), clip


class AestheticPredictor:
    """The head together with the CLIP it was trained on. Takes the arguments of `load_head` and raises its errors."""

    def __init__(self, path: str | Path, batch_size: int = 64, *, key: str = "aesthetic head") -> None:
        self.head, clip = load_head(path, key=key)
        self.encoder = ClipEncoder(clip, batch_size, key=key)
        width = self.encoder.model.config.projection_dim
        if width != self.head.config["in_features"]:
            raise UserError(
                f"{key}: the head takes features of width {self.head.config['in_features']}, "
                f"the CLIP in {str(clip)!r} gives {width}"
            )

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray]) -> list[float]:
        """The head's raw score of each uint8 [H, W, 3] image."""
        scores: list[float] = []
        for start in range(0, len(images), self.encoder.batch_size):
            features = self.encoder.embed_images(images[start : start + self.encoder.batch_size])
            scores += self.head(features).tolist()
        return scores
