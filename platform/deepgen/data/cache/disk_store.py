"""Encodings of images on disk, shared by all ranks and all later runs with the same VAE and visual tower.

    <data.cache_dir>/latent-3f9c01…/about.json                    the facts that the folder's hash covers
                                    train-00000-81d2…/8b0e….safetensors     encodings for one parquet shard; ...
                                                      .5c1a….writing        being written, or left by a killed process

The hash in a folder's name covers everything but the images that determines its encodings: the encoder's weights and
config, image preparation, precision, kind of device, versions. A shard is identified by its size and footer, an image
by a hash of its encoded bytes, so a lookup never returns an encoding of changed data.

Files never change. One process writes a file under a temporary name and renames it when complete. So any number of
processes may fill a folder at the same time; if two write the same encoding, both versions are equal.

Only the index of the shards in use stays in memory; encodings are read on demand.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deepgen.data.loading.dataset import Key, Place
from deepgen.data.uris import version_of
from deepgen.errors import UserError

PENDING_BYTES = 128 << 20  # most bytes of unwritten encodings, per process; a killed process loses at most these
MOST_ENTRIES = 1 << 20  # most index entries, about 150 bytes each; the least recently used shards go first
OPEN_FILES = 64
FORMAT = 1  # version of the files, their names and the digests in them
SUFFIX = ".safetensors"
WRITING = ".writing"
_LEFT_BEHIND_S = 3600.0  # no write takes this long: a killed process left any older temporary file


@dataclass
class _Shard:
    """Index of one encoder's results for one parquet shard: digest of the image -> index in `files`."""

    folder: Path
    files: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    entries: dict[bytes, int] = field(default_factory=dict)


class DiskStore:
    """A `deepgen.data.cache.encoded.Store` in files.

    ``parts``: for each encoder, everything its results depend on, in a form that JSON can hold.

    New encodings wait in memory until `flush`, or until they exceed PENDING_BYTES; `find` returns them meanwhile.
    Raises UserError naming the path if a file cannot be written or read.
    """

    def __init__(
        self, folder: Path, parts: Mapping[str, Mapping[str, Any]], pending_bytes: int = PENDING_BYTES
    ) -> None:
        self._limit, self._held, self._entries = pending_bytes, 0, 0
        self._pending: dict[tuple[str, str], dict[bytes, Tensor]] = {}
        self._shards: OrderedDict[tuple[str, str], _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._shard_name = lru_cache(maxsize=None)(shard_name)
        self._open = lru_cache(maxsize=OPEN_FILES)(_open)
        self._folders = {}
        for part, about in parts.items():
            text = json.dumps({"format": FORMAT, **about}, sort_keys=True, indent=1)
            own = folder / f"{part}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
            self._folders[part] = own
            with _writing(own):
                own.mkdir(parents=True, exist_ok=True)
                if not (own / "about.json").exists():
                    _write(own, "about.json", text.encode())

    def key(self, place: Place, data: bytes | str) -> Key | None:
        """The shard and a hash of the image's content; None if the image is a path with no file."""
        content = version_of(data) if isinstance(data, str) else data
        return None if content is None else (place[0], hashlib.blake2b(content, digest_size=16).digest())

    def find(self, part: str, key: Key, *, refresh: bool) -> Tensor | None:
        file, digest = key
        with self._lock:
            waiting = self._pending.get((part, file), {}).get(digest)
            if waiting is not None:
                return waiting
            shard = self._shard(part, file)
            if digest not in shard.entries and refresh:
                self._refresh(shard)
            number = shard.entries.get(digest)
            if number is None:
                return None
            with _reading(shard.folder / shard.files[number]) as path:
                tensor: Tensor = self._open(path).get_tensor(digest.hex())
                return tensor.clone()  # a copy that does not keep the file mapped

    def put(self, part: str, key: Key, made: Tensor) -> None:
        file, digest = key
        with self._lock:
            waiting = self._pending.setdefault((part, file), {})
            if digest in waiting or digest in self._shard(part, file).entries:
                return
            waiting[digest] = made
            self._held += _size(made)
            while self._held > self._limit:
                self._write_out(*max(self._pending, key=lambda place: sum(map(_size, self._pending[place].values()))))

    def flush(self) -> None:
        with self._lock:
            for part, file in list(self._pending):
                self._write_out(part, file)

    def _write_out(self, part: str, file: str) -> None:
        waiting = self._pending[part, file]
        shard = self._shard(part, file)
        if waiting:
            name = f"{uuid.uuid4().hex}{SUFFIX}"
            with _writing(shard.folder):
                shard.folder.mkdir(parents=True, exist_ok=True)
                _write(shard.folder, name, save({digest.hex(): made for digest, made in waiting.items()}))
            self._read_index(shard, name)
        self._held -= sum(map(_size, waiting.values()))
        del self._pending[part, file]

    def _shard(self, part: str, file: str) -> _Shard:
        if (part, file) in self._shards:
            self._shards.move_to_end((part, file))
            return self._shards[part, file]
        shard = self._shards[part, file] = _Shard(self._folders[part] / self._shard_name(file))
        with _writing(shard.folder):
            _remove_leftovers(shard.folder)
        self._refresh(shard)
        return shard

    def _refresh(self, shard: _Shard) -> None:
        for name in _names(shard.folder):
            if name.endswith(SUFFIX) and name not in shard.seen:
                self._read_index(shard, name)

    def _read_index(self, shard: _Shard, name: str) -> None:
        with _reading(shard.folder / name) as path:
            digests = [bytes.fromhex(key) for key in self._open(path).keys()]  # noqa: SIM118  not a dict
        shard.seen.add(name)
        shard.files.append(name)
        before = len(shard.entries)
        for digest in digests:
            shard.entries.setdefault(digest, len(shard.files) - 1)
        self._entries += len(shard.entries) - before
        while self._entries > MOST_ENTRIES and len(self._shards) > 1:  # the shard in use is the last one
            _, unused = self._shards.popitem(last=False)
            self._entries -= len(unused.entries)


def shard_name(file: str) -> str:
    """A parquet file's name plus a hash of its size and footer (sizes, offsets, statistics)."""
    with Path(file).open("rb") as stream:
        size = stream.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        footer = stream.read(length)
    return f"{Path(file).stem}-{hashlib.blake2b(b'%d:' % size + footer, digest_size=8).hexdigest()}"


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _remove_leftovers(folder: Path) -> None:
    for name in _names(folder):
        if name.endswith(WRITING):
            with suppress(FileNotFoundError):  # another process has renamed or removed it
                if time.time() - (folder / name).stat().st_mtime > _LEFT_BEHIND_S:
                    (folder / name).unlink()


def _write(folder: Path, name: str, content: bytes) -> None:
    """Write a file atomically: even after a power cut it is complete or absent."""
    unfinished = folder / f".{uuid.uuid4().hex}{WRITING}"
    try:
        with unfinished.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(folder / name)
    finally:
        unfinished.unlink(missing_ok=True)  # left if the disk was full


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {path}: {error.strerror or error}; make room or mend the folder, or leave "
            "data.cache_dir empty, then continue with --resume"
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"data.cache_dir: {path} cannot be read ({' '.join(str(error).split())[:160]}); delete it, then continue "
            "with --resume"
        ) from error
