"""What the model's two encoders make of the records' images, made once and kept: in memory, or on disk.

No stage trains these two: the VAE makes ``latent`` [c, h, w] float32 of targets and references, the visual tower of
the VLM makes ``features`` [H / 32, W / 32, vlm_hidden] of references. Everything behind the tower depends on what is
trained (think tokens, LoRA) and is never kept. Images are encoded one at a time, so an encoding depends neither on the
images beside it nor on whether it was kept: with and without a cache, and on resume, a run is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from deepgen.data.loading.dataset import LATENT, Key, Picture, Place

MEMORY_BYTES = 512 << 20  # of encodings kept in memory, per process


class Store(Protocol):
    """Where encodings lie. An encoder, ``part``, is LATENT or FEATURES; an image is named by a key."""

    def key(self, place: Place, data: bytes | str) -> Key | None:
        """The key of an image; None for one that cannot be kept."""

    def find(self, part: str, key: Key, *, refresh: bool) -> Tensor | None:
        """The encoding kept, on the CPU, or None. ``refresh``: also look for what other processes have put by now."""

    def put(self, part: str, key: Key, made: Tensor) -> None: ...

    def flush(self) -> None:
        """Make durable what was put."""


class MemoryStore:
    """Encodings of the first images it sees, up to ``max_bytes``.

    Once full, nothing is thrown out: under shuffled epochs every image is equally likely to come next.
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
        """Nothing outlives the process."""


class EncodingCache:
    """Encodings by way of a store. ``parts``: the encoders by name, each from one image, float32 [3, h, w] in [-1, 1]
    on the CPU, to its encoding on the CPU. Raises ValueError when LATENT is not among them.

    The latent is the mode of the VAE's posterior. (The reference samples it, M1.7; its spread is small against the
    noise that flow matching adds.)
    """

    def __init__(self, parts: Mapping[str, Callable[[Tensor], Tensor]], store: Store) -> None:
        if LATENT not in parts:
            raise ValueError(f"parts are {', '.join(parts) or 'none'}; {LATENT} is always needed")
        self.parts, self.store = parts, store

    def find(self, place: Place, data: bytes | str, needed: Sequence[str]) -> tuple[Key | None, dict[str, Tensor]]:
        """Key of a record's image, and those of the encodings ``needed`` that are kept."""
        key = self.store.key(place, data)
        if key is None:
            return None, {}
        found = {part: self.store.find(part, key, refresh=True) for part in needed if part in self.parts}
        return key, {part: made for part, made in found.items() if made is not None}

    def get(self, part: str, picture: Picture) -> Tensor:
        """The encoding of an image, kept from now on."""
        if part in picture.kept:
            return picture.kept[part]
        made = None if picture.key is None else self.store.find(part, picture.key, refresh=False)
        if made is None:
            made = self.parts[part](picture.image()).contiguous()  # as it will lie in memory when it is read back
            if picture.key is not None:
                self.store.put(part, picture.key, made)
        return made

    def flush(self) -> None:
        self.store.flush()
