"""Training records as input tensors for the model: resized like the reference (M1.9) and scaled to [-1, 1].

``deepgen.data.loading.mixture`` decides which records make a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepgen.data.images import usable_image
from deepgen.data.loading.buckets import fixed_area_size
from deepgen.data.loading.parquet_store import RecordStore
from deepgen.data.records import RecordError, check_texts

# Bump when preprocessing yields different pixels, for the VAE or the VLM, or rejects different images.
PREPARATION = 5
LATENT, FEATURES = "latent", "features"  # encodings of an image by the VAE and by the VLM's visual tower
Place = tuple[str, int, int]  # a record's file and row (from 1), then 0 for its target or n for its n-th reference
Key = tuple[str, bytes]  # the parquet file that holds the image's record, and an id of the image within that file


def image_to_tensor(image: np.ndarray | Image.Image, image_size: int) -> Tensor:
    """uint8 [H, W, 3] or an RGB image -> float32 [3, h, w] in [-1, 1]; `fixed_area_size` gives h and w."""
    return scaled(resized(Image.fromarray(image) if isinstance(image, np.ndarray) else image, image_size))


def resized(image: Image.Image, image_size: int) -> Tensor:
    """An RGB image -> uint8 [h, w, 3]; `fixed_area_size` gives h and w."""
    height, width = fixed_area_size(image.height, image.width, image_size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def scaled(pixels: Tensor) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, h, w] in [-1, 1]."""
    planes = pixels.permute(2, 0, 1).contiguous()  # before the cast: uint8 is a quarter of the bytes to copy
    return planes.float().div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class Picture:
    """One image of a record: its pixels, its cached encodings, or both.

    pixels: uint8 [h, w, 3], on the CPU; None if `kept` already holds every encoding that is needed.
    kept: cached encodings by name (LATENT, FEATURES).
    key: the image's key in the cache; None if the cache does not keep the image.
    """

    pixels: Tensor | None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    key: Key | None = None

    def image(self, device: torch.device | str = "cpu") -> Tensor:
        """The pixels as float32 [3, h, w] in [-1, 1]. Raises ValueError if they were not read."""
        if self.pixels is None:
            raise ValueError(f"image {self.key}: its pixels are needed, but only {', '.join(self.kept)} was read")
        return scaled(self.pixels.to(device))


class Kept(Protocol):
    """A cache of encodings, looked up by image (`deepgen.data.cache.encoded`)."""

    def find(self, place: Place, data: bytes | str, needed: Sequence[str]) -> tuple[Key | None, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Sample:
    """A usable training record."""

    prompt: str
    references: list[Picture]  # [] unless the task is edit
    target: Picture


class TrainingSet:
    """Records with target images, read on demand.

    ``reserved``: the tokenizer's special tokens. No text may contain one, as the model would read it as structure.
    """

    def __init__(self, store: RecordStore, image_size: int, reserved: Sequence[str] = ()) -> None:
        self.store, self.image_size, self._reserved = store, image_size, tuple(reserved)

    def __len__(self) -> int:
        return len(self.store.tasks)

    def sample(self, index: int, kept: Kept | None = None) -> Sample:
        """Record number ``index``. An image is decoded only if ``kept`` lacks one of its encodings.

        Raises RecordError with file, row and reason if the record is unusable.
        """
        record = self.store.read(index)
        file, row = self.store.locate(index)
        place = f"{file}, row {row}"
        if record.image is None:
            raise RecordError(place, "no target image; allowed: records with one", record.id)

        def picture(slot: int, data: bytes | str) -> Picture:
            needed = (LATENT, FEATURES) if slot else (LATENT,)
            key, known = kept.find((file, row, slot), data, needed) if kept else (None, {})
            if all(part in known for part in needed):
                return Picture(None, known, key)
            return Picture(self._tensor(data, f"reference {slot}" if slot else "image"), known, key)

        try:
            check_texts(record, self._reserved)
            references = [picture(slot, data) for slot, data in enumerate(record.references, 1)]
            return Sample(record.prompt, references, picture(0, record.image))
        except ValueError as error:
            raise RecordError(place, str(error), record.id) from error

    def _tensor(self, data: bytes | str, what: str) -> Tensor:
        return resized(usable_image(data, what), self.image_size)
