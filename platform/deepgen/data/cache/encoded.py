"""A cache of the encodings that the model's two image encoders produce, in memory or on disk.

No stage trains the two encoders. The VAE encodes targets and references as ``latent`` [c, h, w] float32. The VLM's
visual tower encodes references as ``features`` [H / 32, W / 32, vlm_hidden]. Everything after the tower depends on
trained weights (think tokens, LoRA) and is never cached.

Images are encoded one at a time, so an encoding does not depend on other images in the batch. A run is therefore
bit-identical with a cache, without one, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from deepgen.data.loading.dataset import LATENT, Key, Picture, Place

MEMORY_BYTES = 512 << 20  # most bytes of encodings in memory, per process


class Store(Protocol):
    """A place to keep encodings. ``part`` names the encoder, LATENT or FEATURES; ``key`` names the image."""

    def key(self, place: Place, data: bytes | str) -> Key | None:
        """The key of an image; None if the store cannot keep this image."""

    def find(self, part: str, key: Key, *, refresh: bool) -> Tensor | None:
        """The stored encoding, on the CPU, or None. ``refresh``: also look for encodings from other processes."""

    def put(self, part: str, key: Key, made: Tensor) -> None: ...

    def flush(self) -> None:
        """Write everything that was put, so that it survives the process."""


class MemoryStore:
    """Keeps the encodings of the first images it sees, up to ``max_bytes``.

    A full store evicts nothing: in shuffled epochs every image is equally likely to come next.
    """

    def __init__(self, max_bytes: int = MEMORY_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: dict[tuple[str, Key], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, place: Place, data: bytes | str) -> Key | None:
        file, row, slot = place
        return file, f"{row}.{slot}".encode()

    def find(self, part: str, key: Key, *, refresh: bool) -> Tensor | None:
        return self._kept.get((part, key))

    def put(self, part: str, key: Key, made: Tensor) -> None:
        size = made.numel() * made.element_size()
        if (part, key) not in self._kept and self._bytes + size <= self._max_bytes:
            self._kept[part, key] = made
            self._bytes += size

    def flush(self) -> None:
        """Do nothing: this store ends with the process."""


class EncodingCache:
    """Returns encodings from a store and computes those that are missing.

    ``parts``: the encoders by name. Each maps one image, float32 [3, h, w] in [-1, 1] on the CPU, to its encoding on
    the CPU. Raises ValueError if LATENT is missing.

    The latent is the mode of the VAE's posterior. (The reference samples it, M1.7, but the posterior's spread is small
    compared with the noise that flow matching adds.)
    """

    def __init__(self, parts: Mapping[str, Callable[[Tensor], Tensor]], store: Store) -> None:
        if LATENT not in parts:
            raise ValueError(f"parts are {', '.join(parts) or 'none'}; {LATENT} is always needed")
        self.parts, self.store = parts, store

    def find(self, place: Place, data: bytes | str, needed: Sequence[str]) -> tuple[Key | None, dict[str, Tensor]]:
        """The key of a record's image, and those of its ``needed`` encodings that are in the store."""
        key = self.store.key(place, data)
        if key is None:
            return None, {}
        found = {part: self.store.find(part, key, refresh=True) for part in needed if part in self.parts}
        return key, {part: made for part, made in found.items() if made is not None}

    def get(self, part: str, picture: Picture) -> Tensor:
        """The encoding of an image: from the store, or computed and then stored."""
        if part in picture.kept:
            return picture.kept[part]
        made = None if picture.key is None else self.store.find(part, picture.key, refresh=False)
        if made is None:
            made = self.parts[part](picture.image()).contiguous()  # the same layout as when read back from disk
            if picture.key is not None:
                self.store.put(part, picture.key, made)
        return made

    def flush(self) -> None:
        self.store.flush()
