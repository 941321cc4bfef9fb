"""Finished groups on disk: a memo of `PolicySampler.sample_group`.

    <run folder>/journal/groups/step-000012-<key>.group      checksum (16 bytes), then a safetensors file

A group depends on the policy version, the run's seed, its prompt, epoch, step and some settings, bit for bit. The key
is a hash of them all, so a rollout actor that is asked for a group looks for its file first: no process has to remember
what there is, and whoever is asked may read what another has drawn. A file that is damaged counts as none.

A file is written aside and renamed, in a thread. It is not flushed to disk: the death of a process or a container loses
nothing of it, that of a machine at most the last seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from actors.experience.journal.origin import JOURNAL, code_version, hash_of
from actors.messages import Arrays, Group, JournalNews
from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.data.uris import read_uri
from deepgen.fingerprint import fingerprint

GIB = 1 << 30
Drawn = tuple[np.ndarray, Arrays]  # images uint8 [G, H, W, 3], packed trajectory
_PENDING = 4  # groups that may wait for the disk; each is held in memory
_CHECKSUM = 16  # bytes
_IMAGES = "images"  # beside the arrays of `pack_samples`, whose names have a slash
_STEP = re.compile(r"step-(\d+)-")
_NOT_DRAWN_WITH = {"actors", "prompts_per_step"}  # keys of rollout that change no group


class GroupJournal:
    """The journal of one rollout actor. `writer` tells actors apart, `kernels` what rounds this process's sums."""

    def __init__(self, settings: Settings, writer: str, kernels: str) -> None:
        self._folder = groups_folder(settings.run.folder)
        self._bound, self._writer = settings.experience.journal * GIB, writer
        self._origin = hash_of(
            settings.run.seed,
            settings.rollout.model_dump(mode="json", exclude=_NOT_DRAWN_WITH),
            settings.data.image_size,
            [settings.model.padding, settings.model.precision],
            fingerprint(settings.model.weights),
            kernels,
            code_version(),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: list[Future[None]] = []
        self._lock = threading.Lock()  # guards _counts and _warnings
        self._counts: Counter[str] = Counter()
        self._warnings: list[str] = []

    def drawn(self, group: Group, checksum: str, draw: Callable[[Group], Drawn]) -> Drawn:
        """The group, from disk or from `draw`.

        group: with the pictures of its prompt. checksum: of the policy's weights. Raises ValueError for a picture that
        cannot be read.
        """
        file = self._folder / f"step-{group.step:06d}-{self._key(group, checksum)}.group"
        found = self._read(file)
        if found is None:
            found = draw(group)
            self._write_soon(file, found)
        return found

    def news(self) -> JournalNews:
        """What has happened since the last call of this function."""
        with self._lock:
            news = JournalNews(dict(self._counts), tuple(self._warnings))
            self._counts, self._warnings = Counter(), []
        return news

    def flush(self, deadline_s: float) -> None:
        """Wait until all groups are written."""
        for pending in self._pending:
            pending.result(deadline_s)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _key(self, group: Group, checksum: str) -> str:
        return hash_of(self._origin, checksum, group.step, group.epoch, _facts(group.record))

    def _read(self, file: Path) -> Drawn | None:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"cannot read {file}: {_reason(error)}; the group is drawn again")
            return None
        checksum, packed = content[:_CHECKSUM], content[_CHECKSUM:]
        if checksum != _checksum(file.name, packed):
            self._tell(f"{file} is damaged; the group is drawn again")
            return None
        arrays = load(packed)
        self._count(groups_read=1)
        return arrays.pop(_IMAGES), arrays

    def _write_soon(self, file: Path, drawn: Drawn) -> None:
        for pending in self._pending:
            if pending.done():
                pending.result()  # raises what is no fault of the disk
        self._pending = [pending for pending in self._pending if not pending.done()]
        if len(self._pending) >= _PENDING:
            self._skip(f"the disk is slower than generation, {_PENDING} groups are waiting for it")
        else:
            self._pending.append(self._thread.submit(self._write, file, drawn))

    def _write(self, file: Path, drawn: Drawn) -> None:
        images, arrays = drawn
        aside = file.with_suffix(f".{self._writer}.writing")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            size = images.nbytes + sum(array.nbytes for array in arrays.values())
            if _bytes_in(file.parent) + size > self._bound:
                self._skip(f"experience.journal: its {self._bound / GIB:g} GiB are full until the next checkpoint")
                return
            # np.ascontiguousarray would turn a scalar into a vector.
            packed = save({name: np.asarray(a, order="C") for name, a in {_IMAGES: images, **arrays}.items()})
            with aside.open("wb") as stream:
                stream.write(_checksum(file.name, packed))
                stream.write(packed)
            aside.replace(file)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            self._skip(f"cannot write to {file.parent}: {_reason(error)}")
            return
        self._count(groups_written=1, bytes_written=len(packed) + _CHECKSUM)

    def _skip(self, why: str) -> None:
        self._count(skipped=1)
        self._tell(f"{why}; groups that are not kept would be drawn again after a death of the run")

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def _tell(self, warning: str) -> None:
        with self._lock:
            self._warnings.append(warning)


def groups_folder(run_folder: Path) -> Path:
    return run_folder / JOURNAL / "groups"


def forget_groups(run_folder: Path, before: int) -> None:
    """Remove the groups of steps before this one. Raises OSError if a file cannot be removed."""
    folder = groups_folder(run_folder)
    for file in list(folder.iterdir()) if folder.is_dir() else []:
        step = _STEP.match(file.name)
        if step and int(step[1]) < before:
            file.unlink(missing_ok=True)


def _facts(record: Record) -> list[str]:
    """All that a group depends on in its prompt. Pictures that are given by path or URI are read."""
    pictures = (read_uri(data) if isinstance(data, str) else data for data in record.references)
    return [record.id, record.task, record.prompt, *(hashlib.blake2b(data).hexdigest() for data in pictures)]


def _checksum(name: str, packed: bytes) -> bytes:
    """Of a file's name, too: a group under another key does not pass."""
    digest = hashlib.blake2b(name.encode(), digest_size=_CHECKSUM)
    digest.update(packed)
    return digest.digest()


def _bytes_in(folder: Path) -> int:
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # renamed or removed by another process
                total += entry.stat().st_size
    return total


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
