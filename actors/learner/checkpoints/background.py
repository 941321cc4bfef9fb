"""A checkpoint under way: each rank copies what it holds, its thread writes that, and rank 0's completes the folder.

    <folder>/.<rank>.written        names and sizes of that rank's files, all flushed; renamed into place

Rank 0's thread waits for these lists. The threads use no collectives, which would mix with those of the training: the
ranks tell each other of failures when they next meet, in ``finish``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from actors.learner.checkpoints.checkpoint_shards import Pieces, write_shard
from actors.learner.checkpoints.host_copy import HostCopies
from actors.learner.collectives import gather
from deepgen.errors import UserError

# Below the 30 minutes after which collectives fail, so that these errors come first: they say what is missing.
WRITE_S = 1200.0  # for the thread, to write a rank's files or to complete the folder
OTHERS_S = 600.0  # for the other ranks' files, once rank 0's own are written
OTHERS_AT_THE_END_S = 30.0  # the same when the run ends with an error: the other ranks may be gone
_LOOK_S = 0.05
_DISK = (OSError, SafetensorError)


@dataclass(frozen=True)
class Place:
    """The folder that the ranks write a checkpoint into, and which of them this is."""

    folder: Path
    rank: int
    world: int


@dataclass
class _UnderWay:
    what: str
    place: Place
    mine: Future[None]
    whole: Future[None] | None  # rank 0 only


class Background:
    """Writes checkpoints behind the training, at most one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: _UnderWay | None = None
        self._others_s = OTHERS_S
        self._copies = HostCopies()

    def start(
        self,
        what: str,
        place: Place,
        shards: Mapping[str, Pieces],
        write_more: Callable[[Path], None] | None,
        complete: Callable[[dict[str, int]], None],
    ) -> None:
        """Copy the shards, then let the thread write them. The checkpoint before must be finished.

        Rank 0's thread also calls ``write_more`` with the folder, and ``complete`` with names and sizes in bytes of all
        ranks' files once these are there.
        """
        copies, self._others_s = self._copies.take(shards), OTHERS_S
        mine = self._thread.submit(_write, place, copies, write_more if place.rank == 0 else None)
        whole = self._thread.submit(self._complete, place, mine, complete) if place.rank == 0 else None
        self._under_way = _UnderWay(what, place, mine, whole)

    def finish(self) -> None:
        """Wait for the checkpoint under way, if any. Collective; if it has failed on one rank, all ranks raise."""
        begun, self._under_way = self._under_way, None
        if begun is None:
            return
        try:
            fail_together(_outcome(begun.mine), begun.place.world, begun.what)
            fail_together(_outcome(begun.whole) if begun.whole else None, begun.place.world, begun.what)
        finally:
            self._others_s = 0.0  # after a failure, rank 0's thread must not wait for files that will not come

    def close(self, say: Callable[[str], None]) -> None:
        """Wait for the checkpoint under way without the other ranks. Raises nothing: a failure is said.

        For the end of a run that has failed otherwise; any other run has called ``finish``.
        """
        begun, self._under_way = self._under_way, None
        if begun is not None:
            self._others_s = OTHERS_AT_THE_END_S
            failure = _outcome(begun.mine) or (_outcome(begun.whole) if begun.whole else None)
            if failure is not None:
                say(f"cannot write {begun.what}: {in_one_line(failure)}")
        self._thread.shutdown(wait=False)

    def _complete(self, place: Place, mine: Future[None], complete: Callable[[dict[str, int]], None]) -> None:
        mine.result()  # has ended, for there is one thread; without it there is nothing to complete
        files = self._files_of_all(place)
        for rank in range(place.world):
            _list(place.folder, rank).unlink()
        complete(files)

    def _files_of_all(self, place: Place) -> dict[str, int]:
        """Names and sizes of all ranks' files, once they are there. TimeoutError with the ranks whose are not."""
        files: dict[str, int] = {}
        missing, begin = list(range(place.world)), time.monotonic()
        while missing:
            found = {rank: _listed(place.folder, rank) for rank in missing}
            missing = [rank for rank in missing if found[rank] is None]
            for listed in found.values():
                files |= listed or {}
            if missing and time.monotonic() - begin >= self._others_s:
                raise TimeoutError(f"ranks {missing} have not written their files after {self._others_s:.0f} s")
            if missing:
                time.sleep(_LOOK_S)
        return files


def fail_together(failure: BaseException | None, world: int, what: str) -> None:
    """Raise on every rank if one of them has a ``failure``. Collective.

    UserError if the disk is the cause. Otherwise a rank raises its own failure, and those without one RuntimeError.
    """
    mine = None if failure is None else (isinstance(failure, _DISK), in_one_line(failure))
    failed = {rank: other for rank, other in enumerate(gather(mine, world)) if other}
    if not failed:
        return
    text = "; ".join(f"rank {rank}: {said}" if world > 1 else said for rank, (_, said) in failed.items())
    if all(disk for disk, _ in failed.values()):
        raise UserError(f"run.dir: cannot write {what}: {text}; make room, then continue with --resume") from failure
    if failure is not None and not isinstance(failure, _DISK):
        raise failure
    raise RuntimeError(f"cannot write {what}: {text}") from failure


def _write(place: Place, shards: Mapping[str, Pieces], write_more: Callable[[Path], None] | None) -> None:
    files = [file for name, pieces in shards.items() for file in write_shard(place.folder, name, place.rank, pieces)]
    if write_more:
        write_more(place.folder)
    sizes = {file.name: file.stat().st_size for file in files}
    done = _list(place.folder, place.rank)
    part = done.with_suffix(".part")
    part.write_text(json.dumps(sizes), encoding="utf-8")
    part.rename(done)


def _list(folder: Path, rank: int) -> Path:
    return folder / f".{rank}.written"


def _listed(folder: Path, rank: int) -> dict[str, int] | None:
    """Names and sizes of a rank's files, or None until all of them are seen here: they may be another host's."""
    try:
        sizes: dict[str, int] = json.loads(_list(folder, rank).read_text(encoding="utf-8"))
        return sizes if all((folder / name).stat().st_size == size for name, size in sizes.items()) else None
    except FileNotFoundError:
        return None


def _outcome(future: Future[None]) -> BaseException | None:
    """What the thread's work has failed with, or None. Waits for its end."""
    try:
        return future.exception(timeout=WRITE_S)
    except TimeoutError:
        return TimeoutError(f"the thread that writes it has not ended after {WRITE_S:.0f} s")


def in_one_line(error: BaseException) -> str:
    """What an error says, short enough for a console line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
