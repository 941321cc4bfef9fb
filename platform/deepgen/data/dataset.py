"""Training records as model-side tensors: resized like the paper does it (M1.9), scaled to [-1, 1].

Left out on purpose: which records make a batch (``deepgen.data.mixture``).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepgen.config.errors import UserError
from deepgen.config.settings import TASKS
from deepgen.data.records import MAX_ASPECT, open_image
from deepgen.data.store import ParquetStore, RecordStore

SIDE_MULTIPLE = 32  # latents, DiT patches and the 28/32 resize for the VLM all divide it


def fixed_area_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) with about image_size^2 pixels, each side rounded up to a multiple of 32 (M1.9 fix_pixels)."""
    ratio = image_size / math.sqrt(height * width)

    def fit(side: int) -> int:
        # 1e-9: 600 * (512 / 600) is 512.0000000000001 and must stay 512
        return math.ceil(side * ratio / SIDE_MULTIPLE - 1e-9) * SIDE_MULTIPLE

    return fit(height), fit(width)


def image_to_tensor(image: np.ndarray | Image.Image, image_size: int) -> Tensor:
    """uint8 [H, W, 3] or an RGB image -> float32 [3, h, w] in [-1, 1]; area and sides as `fixed_area_size`."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    height, width = fixed_area_size(picture.height, picture.width, image_size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    # Turned while it is small: four times fewer bytes to move than as floats.
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # [3, h, w]
    return pixels.float().div_(127.5).sub_(1.0)


class TrainingSet:
    """Records with target images in two sources, editing and generation (M2.4), read when they are needed.

    ``edit`` and ``t2i`` are the record numbers of each source; tasks text and reasoning count as generation.
    """

    def __init__(self, store: RecordStore, image_size: int) -> None:
        self.store, self.image_size = store, image_size
        is_edit = store.tasks == TASKS.index("edit")
        self.edit, self.t2i = np.flatnonzero(is_edit), np.flatnonzero(~is_edit)

    @classmethod
    def read(cls, path: Path, image_size: int) -> TrainingSet:
        """Open a parquet file or folder; raises UserError naming file and row."""
        return cls(ParquetStore(path), image_size)

    def __len__(self) -> int:
        return len(self.store.tasks)

    def blocks(self) -> dict[str, np.ndarray]:
        """Records of each source in every block of the store."""
        rows = {"edit": self.edit, "t2i": self.t2i}
        counts = {source: np.diff(np.searchsorted(own, self.store.starts)) for source, own in rows.items()}
        return {source: found[found > 0] for source, found in counts.items()}

    def prompt(self, index: int) -> str:
        """Caption or instruction of a record."""
        return self.store.read(index).prompt

    def target(self, index: int) -> Tensor:
        """Target image of a record, float32 [3, h, w] in [-1, 1]."""
        data = self.store.read(index).image
        if data is None:
            raise UserError(f"{self.store.place(index)}: no target image; allowed: records with one")
        return self._tensor(index, data, "image")

    def references(self, index: int) -> list[Tensor]:
        """Source images of a record, float32 [3, h, w] in [-1, 1] each; [] unless it is an edit."""
        encoded = self.store.read(index).references
        return [self._tensor(index, data, f"reference {slot + 1}") for slot, data in enumerate(encoded)]

    def _tensor(self, index: int, data: bytes, what: str) -> Tensor:
        place = self.store.place(index)
        try:
            image = open_image(data)
        except ValueError as error:
            raise UserError(f"{place}: {what} is {error}") from error
        sides = sorted(image.size)
        if sides[1] > MAX_ASPECT * sides[0]:
            raise UserError(
                f"{place}: {what} is {image.width}x{image.height} px; "
                f"allowed: sides in a ratio of at most {MAX_ASPECT:g}"
            )
        return image_to_tensor(image, self.image_size)
