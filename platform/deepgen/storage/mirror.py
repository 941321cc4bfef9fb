"""Keeps the folder of a run in a bucket, behind the run: nothing waits for it until the run's end.

    run folder ─▶ every few seconds: files that have changed, then complete checkpoints, the newest first ─▶ bucket
    bucket ─▶ at a resume: the newest complete checkpoint and the small files, unless this machine has newer ones

A checkpoint is complete when its manifest is there, which is brought last and removed first. While the bucket cannot be
reached the run goes on, and its checkpoints stay here as in any run folder. `OWNER` says which program writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepgen.errors import UserError
from deepgen.storage.bucket import Bucket, BucketError
from deepgen.storage.staging import address_of

PERIOD_S, LONGEST_PAUSE_S = 5.0, 60.0  # between looks at the folder; the longest while the bucket does not answer
END_S = 600.0  # for what is left at the end
LARGE, LARGE_S = 8 << 20, 60.0  # a file beyond this size that grows is brought at most so often
OWNER, BEAT_S, DEAD_S = ".owner.json", 30.0, 120.0  # who writes, how often it says so, and when it counts as dead
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
_STEP = re.compile(rf"{CHECKPOINTS}/(step-\d{{6,}})/(.+)")
_LEFT_OUT = re.compile(rf"ray_train/|{CHECKPOINTS}/(?!step-\d)|\.writing-|.*\.(?:lock|tmp)$|{re.escape(OWNER)}$")
Stamp = tuple[int, int]  # of a file: bytes and time of its last change


class Mirror:
    """The run folder `folder` and its copy in `bucket`. `say` gets lines for the console."""

    def __init__(self, folder: Path, bucket: Bucket, say: Callable[[str], None] = print) -> None:
        self._folder, self._bucket, self._say = folder, bucket, say
        self._brought: dict[str, Stamp] = {}
        self._brought_at: dict[str, float] = {}
        self._steps = set[str]()  # checkpoints that are there as a whole
        self._away_since: float | None = None
        self._beaten = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="mirror", daemon=True)

    def begin(self, *, resume: bool) -> None:
        """Check the bucket, fetch what a resume needs, and begin to bring changes.

        Raises UserError if the bucket cannot be used, if a program that lives writes this run, or if a new run would
        mix with one that is there.
        """
        try:
            self._claim()
            there = self._bucket.sizes("")
            steps = complete_steps(there)
            if resume:
                self._fetch(there, max(steps, default=""))
            elif any(name != OWNER for name in there):
                self._bucket.delete([OWNER])
                raise UserError(
                    f"run.dir: {self._bucket.address} holds a run already; allowed: another run.name, or --resume to "
                    "continue it"
                )
        except BucketError as error:
            raise UserError(f"run.dir: {error}") from error
        self._steps = steps if resume else set()
        self._thread.start()

    def end(self) -> None:
        """Bring what is left. Raises UserError if that does not succeed within END_S; it then lies here."""
        self._ending.set()
        self._thread.join()
        ends = time.monotonic() + END_S
        while True:
            try:
                self.bring(final=True)
                self._bucket.delete([OWNER])
                return
            except BucketError as error:
                if time.monotonic() > ends:
                    raise UserError(
                        f"run.dir: not all of the run could be brought to {self._bucket.address} within {END_S:g} s: "
                        f"{error}; it is in {self._folder}, and --resume brings it"
                    ) from error
                self._tell(error)
                time.sleep(PERIOD_S)

    def bring(self, *, final: bool = False) -> None:
        """Bring all changes since the last time. Raises BucketError; what was brought until then counts."""
        self._beat()
        now = time.monotonic()
        names = _files(self._folder)
        for name, stamp in names.items():
            if _STEP.fullmatch(name) or self._brought.get(name) == stamp:
                continue
            if final or stamp[0] <= LARGE or now - self._brought_at.get(name, -LARGE_S) >= LARGE_S:
                self._upload(name, stamp)
        here = sorted({found[1] for name in names if (found := _STEP.fullmatch(name)) and found[2] == MANIFEST})
        for step in reversed(here):
            if step not in self._steps:
                self._bring_step(step, [name for name in names if name.startswith(f"{CHECKPOINTS}/{step}/")])
        if here and here[-1] in self._steps:
            for step in sorted(self._steps - set(here)):
                self._drop(step)

    # -- internals -----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        pause = PERIOD_S
        while not self._ending.wait(pause):
            try:
                self.bring()
            except BucketError as error:
                self._tell(error)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self._away_since is not None:
                self._say(f"{self._bucket.address} answers again, after {time.monotonic() - self._away_since:.0f} s")
                self._away_since = None
            pause = PERIOD_S

    def _tell(self, error: BucketError) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._say(f"{error}; the run goes on, and its files are brought later")

    def _upload(self, name: str, stamp: Stamp) -> None:
        try:
            self._bucket.upload(self._folder / name, name)
        except FileNotFoundError:
            return  # removed meanwhile
        self._brought[name], self._brought_at[name] = stamp, time.monotonic()

    def _bring_step(self, step: str, names: list[str]) -> None:
        """A checkpoint's files, and its manifest when they are all there. It may be removed here meanwhile."""
        manifest = f"{CHECKPOINTS}/{step}/{MANIFEST}"
        try:
            for name in names:
                if name != manifest and name not in self._brought:
                    self._bucket.upload(self._folder / name, name)
                    self._brought[name] = (0, 0)
            self._bucket.upload(self._folder / manifest, manifest)
        except FileNotFoundError:
            return
        self._steps.add(step)

    def _drop(self, step: str) -> None:
        folder = f"{CHECKPOINTS}/{step}"
        self._bucket.delete([f"{folder}/{MANIFEST}"])  # so that nobody takes it for a whole one
        self._steps.discard(step)
        self._bucket.delete(f"{folder}/{name}" for name in self._bucket.sizes(folder))

    def _fetch(self, there: dict[str, int], newest: str) -> None:
        """Bring the run here, unless this machine's copy is as new."""
        here = max(complete_steps({name: size for name, (size, _) in _files(self._folder).items()}), default="")
        if here >= newest and (here or self._folder.exists()):
            return
        if self._folder.exists():
            shutil.rmtree(self._folder)  # older than what is in the bucket: another machine went on with it
        wanted = {name: size for name, size in there.items() if name.startswith(f"{CHECKPOINTS}/{newest}/") and newest}
        small = {name: size for name, size in there.items() if not _STEP.fullmatch(name) and not _LEFT_OUT.match(name)}
        self._say(f"fetching the run from {self._bucket.address}: {newest or 'no checkpoint yet'}")
        for name, size in (small | wanted).items():
            if not name.endswith(f"/{MANIFEST}"):
                self._bucket.download(name, self._folder / name, size)
        for name in (name for name in wanted if name.endswith(f"/{MANIFEST}")):
            self._bucket.download(name, self._folder / name, wanted[name])

    def _claim(self) -> None:
        """Say that this program writes the run. Raises UserError if another one does."""
        content = self._bucket.get(OWNER)
        try:
            owner = json.loads(content or b"null")
        except ValueError:
            owner = None  # cut off, or not ours
        if owner and time.time() - owner["time"] < DEAD_S and not _ended(owner):
            raise UserError(
                f"run.dir: {self._bucket.address} is written by process {owner['pid']} on {owner['host']}, which said "
                f"so {time.time() - owner['time']:.0f} s ago; allowed: another run.name, or wait until it has ended"
            )
        self._beat(force=True)

    def _beat(self, *, force: bool = False) -> None:
        if not force and time.monotonic() - self._beaten < BEAT_S:
            return
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self._bucket.put(OWNER, json.dumps(facts).encode())
        self._beaten = time.monotonic()


@contextmanager
def mirrored(folder: Path, *, resume: bool) -> Iterator[None]:
    """While the context is open, keep a run's folder in its bucket; nothing where it lies in none. See `Mirror`."""
    address = address_of(folder)
    if address is None:
        yield
        return
    mirror = Mirror(folder, Bucket(address))
    mirror.begin(resume=resume)
    try:
        yield
    finally:
        mirror.end()


def complete_steps(sizes: dict[str, int]) -> set[str]:
    """The checkpoints whose manifest is among these files."""
    return {found[1] for name in sizes if (found := _STEP.fullmatch(name)) and found[2] == MANIFEST}


def _files(folder: Path) -> dict[str, Stamp]:
    """Size and time of all files of a run that are brought, by name. Those that go meanwhile are left out."""
    found: dict[str, Stamp] = {}
    for parent, _, names in os.walk(folder):
        for file in (Path(parent) / name for name in names):
            name = file.relative_to(folder).as_posix()
            if _LEFT_OUT.match(name) or "/.writing-" in name:
                continue
            try:
                facts = file.stat()
            except FileNotFoundError:
                continue
            found[name] = facts.st_size, facts.st_mtime_ns
    return found


def _ended(owner: dict[str, object]) -> bool:
    """Whether the owner is a process of this machine that does not live any more, or this one."""
    if owner["host"] != socket.gethostname():
        return False
    pid = int(str(owner["pid"]))
    return pid == os.getpid() or not Path(f"/proc/{pid}").exists()
