"""Training records as model-side tensors: resized like the paper does it (M1.9), scaled to [-1, 1].

Left out on purpose: which records make a batch (``deepgen.data.mixture``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepgen.data.buckets import fixed_area_size
from deepgen.data.records import RecordError, check_prompt, usable_image
from deepgen.data.store import RecordStore


def image_to_tensor(image: np.ndarray | Image.Image, image_size: int) -> Tensor:
    """uint8 [H, W, 3] or an RGB image -> float32 [3, h, w] in [-1, 1]; area and sides as `fixed_area_size`."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    height, width = fixed_area_size(picture.height, picture.width, image_size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    # Turned while it is small: four times fewer bytes to move than as floats.
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # [3, h, w]
    return pixels.float().div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class Sample:
    """A usable training record; images float32 [3, h, w] in [-1, 1], on the CPU."""

    prompt: str
    references: list[Tensor]  # [] unless it is an edit
    target: Tensor | None  # None when it was not asked for


class TrainingSet:
    """Records with target images, read when they are needed.

    ``reserved``: texts no prompt may contain, the tokenizer's special tokens, which would pass for structure.
    """

    def __init__(self, store: RecordStore, image_size: int, reserved: Sequence[str] = ()) -> None:
        self.store, self.image_size, self._reserved = store, image_size, tuple(reserved)

    def __len__(self) -> int:
        return len(self.store.tasks)

    def sample(self, index: int, *, target: bool = True) -> Sample:
        """Record number ``index``. Raises RecordError with file, row and reason when it cannot be used."""
        record = self.store.read(index)
        file, row = self.store.locate(index)
        place = f"{file}, row {row}"
        if record.image is None:
            raise RecordError(place, "no target image; allowed: records with one", record.id)
        try:
            check_prompt(record.prompt, self._reserved)
            references = [self._tensor(data, f"reference {slot}") for slot, data in enumerate(record.references, 1)]
            return Sample(record.prompt, references, self._tensor(record.image, "image") if target else None)
        except ValueError as error:
            raise RecordError(place, str(error), record.id) from error

    def _tensor(self, data: bytes | str, what: str) -> Tensor:
        return image_to_tensor(usable_image(data, what), self.image_size)
