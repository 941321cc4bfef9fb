"""Flat tensors stored in pieces: each worker writes the pieces it holds, and any number of workers reads any range.

    <folder>/<name>-<rank>.safetensors      pieces of that rank, each called <key>@<its first element>
    <folder>/<name>-<rank>.blake2b          checksum of that file, see `check_shards`

Exactly one rank writes each element. A run can therefore continue with a different number of workers: a reader does not
care which rank wrote an element, and no process ever holds the whole model to find it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepgen.errors import UserError
from deepgen.fingerprint import file_checksum

CHECKSUM = ".blake2b"
Pieces = Iterable[tuple[str, int, Tensor]]  # (key, first element, values [n])
ENGINE, AVERAGES = "engine", "ema"  # names of shards: what the engine updates, and averages of the weights


def write_shard(folder: Path, name: str, rank: int, pieces: Pieces) -> list[Path]:
    """Write this rank's pieces. Returns the files, flushed to disk; without pieces there are none.

    Raises OSError or SafetensorError if the file cannot be written, UserError for a number that is not finite.
    """
    tensors = {f"{key}@{start}": values.detach() for key, start, values in pieces if values.numel()}
    if not tensors:
        return []
    for key, values in tensors.items():
        if not torch.linalg.vector_norm(values, math.inf).isfinite():
            raise UserError(
                f"{folder}: {key} is not finite, so {name}-{rank} is not written; lower train.learning_rate, then "
                "continue from the last checkpoint with --resume"
            )
    file = folder / f"{name}-{rank}.safetensors"
    save_file(tensors, file)
    checksum = file.with_suffix(CHECKSUM)
    checksum.write_text(file_checksum(file), encoding="utf-8")
    flush(file)
    flush(checksum)
    return [file, checksum]


def flush(path: Path) -> None:
    """Return when a file, or the entries of a folder, are on the disk. Only the host that wrote them can ask for it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    values: Any  # safetensors slice: indexing it reads that range from the file


class ShardReader:
    """Reads the files of ``write_shard``.

    The file of ``rank`` is opened first, the others only if an element is not in it. A worker whose layout has not
    changed therefore opens one file.
    """

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self._folder = folder
        own = folder / f"{name}-{rank}.safetensors"
        self._unopened = sorted(folder.glob(f"{name}-*.safetensors"), key=lambda file: file != own)
        self._pieces: dict[str, list[_Piece]] = {}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Elements ``start`` to ``start + count`` of ``key``, [count] on the CPU. UserError if some are missing."""
        result = torch.empty(count, dtype=torch.float32)
        missing, looked = count, 0
        while missing:
            pieces = self._pieces.get(key, [])
            if looked < len(pieces):
                missing -= _copy(pieces[looked], start, result)
                looked += 1
            elif self._unopened:
                self._open(self._unopened.pop(0))
            else:
                raise UserError(
                    f"{self._folder}: {missing} of {count} elements of {key} from {start} on are not there; "
                    "allowed: a checkpoint of the model that model.weights and model.preset name"
                )
        return result

    def has(self, key: str) -> bool:
        """Whether a file has elements of this key."""
        while key not in self._pieces and self._unopened:
            self._open(self._unopened.pop(0))
        return key in self._pieces

    def _open(self, file: Path) -> None:
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118  # not a dict: it has no iterator
            key, _, start = name.rpartition("@")
            values = opened.get_slice(name)
            first = int(start)
            self._pieces.setdefault(key, []).append(_Piece(first, first + values.get_shape()[0], values))


def is_as_written(file: Path) -> bool:
    try:
        return file.with_suffix(CHECKSUM).read_text(encoding="utf-8") == file_checksum(file)
    except OSError:
        return False


def _copy(piece: _Piece, start: int, result: Tensor) -> int:
    """Copy the part of the piece that overlaps ``result`` (elements from ``start`` on). Returns its element count."""
    begin, end = max(start, piece.start), min(start + result.numel(), piece.end)
    if begin >= end:
        return 0
    result[begin - start : end - start] = piece.values[begin - piece.start : end - piece.start]
    return end - begin
