"""Hands the readers damaged and hostile inputs, and watches what they do.

Allowed is to take an input, to leave out rows with a reason, and to refuse all of it with the one line of a `UserError`
or a `UriError`. Anything else is a fault: another exception, no answer within `DEADLINE_S`, the end of the process, the
start of a program, a file written outside of the trial's own folder, a connection to an address that is not public.

Each kind of input runs in a process of its own, which this one watches and, after a hang or a death, starts again
behind the input that caused it. Names are resolved to addresses of a small table and no connection is ever made.
"""

from __future__ import annotations

import importlib
import ipaddress
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepgen.errors import UserError

DEADLINE_S = 40.0  # for one input; the readers' own for one request is 30 s
START_DEADLINE_S = 300.0  # for imports
# Of 55,000 inputs; the rest of the kinds is cheap or has few shapes.
SHARES = {"pictures": 15, "archives": 7, "tables": 7, "lists": 8, "recipes": 3, "manifests": 3, "addresses": 12}
FUZZ_HEADER = "| inputs | given | taken, or a part of it | refused | faults | peak memory |\n" + "|---" * 6 + "|"
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.utime",
)
_STATUS = Path("/proc/self/status")
_HARMLESS = ("/dev/null",)
_NAMES = {"localhost": "127.0.0.1", "metadata.google.internal": "169.254.169.254"}  # all others are public


@dataclass
class Outcome:
    """What came of one kind of input. `faults`: the number of the input, and what happened."""

    taken: int = 0
    refused: int = 0
    peak_mib: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)

    def row(self, kind: str) -> str:
        """One line of the table."""
        given = self.taken + self.refused + len(self.faults)
        return (
            f"| {kind} | {given:,} | {self.taken:,} | {self.refused:,} | {len(self.faults)} | {self.peak_mib:,} MiB |"
        )


def run_fuzz(
    kind: str, count: int, seed: int = 0, *, readers: str = "soak.fuzz_readers", deadline_s: float = DEADLINE_S
) -> Outcome:
    """Hand one kind of input, a key of `SHARES`, to its reader, so many of them. readers: the module that has it."""
    total, first = Outcome(), 0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        while first < count:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(f"{readers}:{kind}", seed, first, count, Path(folder), there))
            process.start()
            there.close()
            first = _watch(process, here, first, total, deadline_s)
    return total


def _watch(process: Any, here: Any, first: int, total: Outcome, deadline_s: float) -> int:
    """Follow a worker to its end, adding up. Returns the number of the input to go on with."""
    at, begun = first, False  # the first message comes after imports, for which the deadline is longer
    while True:
        try:
            if not here.poll(deadline_s if begun else START_DEADLINE_S):
                process.kill()
                process.join()
                total.faults.append((at, f"no answer within {deadline_s:.0f} s"))
                return at + 1
            at, what, peak = here.recv()
        except EOFError:
            process.join()
            if not begun:
                raise RuntimeError(f"the process for the inputs cannot start (exit code {process.exitcode})") from None
            total.faults.append((at, f"the process ended with {process.exitcode}"))
            return at + 1
        begun = True
        total.peak_mib = max(total.peak_mib, peak)
        if what == "taken":
            total.taken += 1
        elif what == "refused":
            total.refused += 1
        elif what == "end":
            process.join()
            return at
        elif what != "begin":
            total.faults.append((at, what))


# ---------------------------------------------------------------- in the worker


def _work(reader: str, seed: int, first: int, count: int, folder: Path, pipe: Any) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  libraries complain of what they read
    os.chdir(folder)
    module, _, kind = reader.partition(":")
    take: Callable[[random.Random, Path], bool] = getattr(importlib.import_module(module), kind)
    guard = _Guard(folder)
    _outcome(take, random.Random(0), folder)  # imports and caches are no fault of an input
    _empty(folder)
    pipe.send((first, "begin", 0))
    sys.addaudithook(guard)
    for number in range(first, count):
        pipe.send((number, "begin", 0))
        guard.seen.clear()
        guard.on = True
        what = _outcome(take, random.Random(f"{kind}/{seed}/{number}"), folder)
        guard.on = False
        if guard.seen:
            what = "; ".join(guard.seen)
        pipe.send((number, what, _peak_mib()))
        _empty(folder)
    pipe.send((count, "end", 0))


def _peak_mib() -> int:
    """Of this process alone; what `resource` says begins with the peak of the one that started it."""
    (line,) = [line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) >> 10


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _outcome(take: Callable[[random.Random, Path], bool], chance: random.Random, folder: Path) -> str:
    from deepgen.data.uris import UriError

    try:
        return "taken" if take(chance, folder) else "refused"
    except (UserError, UriError) as error:
        return "refused" if str(error).strip() else f"no reason: {error!r}"
    except BaseException as error:  # noqa: BLE001  what is looked for
        return f"{type(error).__name__}: {str(error)[:300]}"


class _Guard:
    """Notes starts of programs, changes outside of a folder and connections to addresses that are not public."""

    def __init__(self, folder: Path) -> None:
        self._inside = str(folder.resolve()) + os.sep
        self.on, self.seen = False, list[str]()
        socket.getaddrinfo = _resolved

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _PROGRAMS:
            self.seen.append(f"program started: {event} {str(arguments)[:200]}")
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ) or event in _CHANGES:
            self._changed(arguments[0])
        elif event == "socket.connect":
            self._connected(arguments[1])

    def _changed(self, path: Any) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not f"{real}{os.sep}".startswith(self._inside) and real not in _HARMLESS:
            self.seen.append(f"written: {real[:200]}")

    def _connected(self, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else str(address)
        try:
            public = ipaddress.ip_address(host).is_global
        except ValueError:
            public = False
        if not public:
            self.seen.append(f"connection to {host}")
        raise ConnectionRefusedError("no connection is made here")


def _resolved(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
    """Stands in for the resolver."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    try:
        found = str(ipaddress.ip_address(name))
    except ValueError:
        try:
            found = socket.inet_ntoa(socket.inet_aton(name))  # as the C library reads 127.1 and 0x7f000001
        except (OSError, TypeError, ValueError):
            found = _NAMES.get(str(name).lower(), "93.184.215.14")
    family = socket.AF_INET6 if ":" in found else socket.AF_INET
    place = (found, port or 0, 0, 0) if ":" in found else (found, port or 0)
    return [(family, socket.SOCK_STREAM, 6, "", place)]
