"""Encodings of images on disk, beside the runs, for all ranks and all later runs with the same VAE and visual tower.

    <data.cache_dir>/latent-3f9c01…/about.json                    what the number of the folder was made of
                                    train-00000-81d2…/8b0e….safetensors     encodings for one parquet shard; ...
                                                      .5c1a….writing        being written, or left by a kill

A folder is named by a hash of all its encodings depend on beside the images: the encoder's weights and config, how
images are prepared, precision, kind of device, versions. A shard is known by its size and footer, an image in it by a
hash of its encoded bytes, so nothing that has changed is ever found. Files never change: each is written aside by one
process and renamed when it is whole, so any number of processes may fill the same folder at once; what two have made is
equal.
No more than the index of the shards in use is in memory; encodings are read when they are asked for.
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

PENDING_BYTES = 128 << 20  # of encodings that wait to be written, per process; so much work a kill costs at most
MOST_ENTRIES = 1 << 20  # of the index, about 150 bytes each; shards not used for longest go first
OPEN_FILES = 64
FORMAT = 1  # of the files, their names and the digests in them
SUFFIX = ".safetensors"
WRITING = ".writing"
_LEFT_BEHIND_S = 3600.0  # no write takes so long: what is older was left by a kill


@dataclass
class _Shard:
    """Index of one encoder's results for one parquet shard: digest of the image -> number of the file."""

    folder: Path
    files: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    entries: dict[bytes, int] = field(default_factory=dict)


class DiskStore:
    """A `deepgen.data.cache.encoded.Store` in files. ``parts``: of each encoder all that its results depend on,
    JSON-able.

    Encodings wait in memory until PENDING_BYTES have come together or `flush`; they are found meanwhile. Raises
    UserError naming the path when a file cannot be written or read.
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
        """By the image itself; None for a path that is not there."""
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
                return tensor.clone()  # of its own memory, not of the mapped file

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
        while self._entries > MOST_ENTRIES and len(self._shards) > 1:  # the one in use is the last
            _, unused = self._shards.popitem(last=False)
            self._entries -= len(unused.entries)


def shard_name(file: str) -> str:
    """Name and content of a parquet file, as far as its size and its footer (sizes, offsets, statistics) tell it."""
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
            with suppress(FileNotFoundError):  # whole by now, or removed by another process
                if time.time() - (folder / name).stat().st_mtime > _LEFT_BEHIND_S:
                    (folder / name).unlink()


def _write(folder: Path, name: str, content: bytes) -> None:
    """A whole file or none, also after a power cut."""
    unfinished = folder / f".{uuid.uuid4().hex}{WRITING}"
    try:
        with unfinished.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(folder / name)
    finally:
        unfinished.unlink(missing_ok=True)  # of a full disk


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
