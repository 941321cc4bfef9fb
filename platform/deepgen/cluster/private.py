"""A Ray cluster of this program alone: it listens on 127.0.0.1 and begins and ends with the program.

Its token is in the environment and its files lie in a folder that only this user can enter, so it needs no home folder.
Every program has a folder of its own in there, and holds a lock on it for as long as it lives: a folder whose lock is
free belongs to a program that has ended or died, and the next one removes it.

What Ray cannot be told: the modes of what it makes (0777 for folders, 0644 for files, whatever the umask is), and to do
without TCP between the processes of one machine. The folder around its files, the address and the token make up for it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepgen.errors import UserError
from deepgen.machine import prepare_process, private_folder

# Ray puts sockets under its temporary folder; Linux allows 107 characters for a socket's whole path, and
# /session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store are 64 of them.
MAX_TEMP_DIR = 43
_SESSION = re.compile(r"s[0-9a-f]{4}")
_LOCK_DEADLINE_S = 30.0

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # Ray's own switch that makes a node listen on the loopback address only. Off means: no cluster of several nodes.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "PYTHONUTF8": "1",  # workers read and print UTF-8 whatever the locale is
}
# torch's compiler hands its own paths to g++ without quotes.
_NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
_held: list[int] = []  # locked folders of this process


def start_private(num_cpus: int = 0, **options: Any) -> None:
    """Start a private cluster and connect this process. num_cpus: 0 is all that this process may use.

    options: others of `ray.init`. Raises UserError if the folder for its files cannot be had, and what `ray.init`
    raises.
    """
    prepare_process()
    os.environ.update(environment(sys.prefix))
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when ray was imported, perhaps before this
    reread_authentication()
    private = private_folder(MAX_TEMP_DIR - len("/s0000"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private / "inductor"))
    folder = own_session(private)
    with _temporary_files_in(folder / "tmp"):
        ray.init(
            address="local",
            num_cpus=num_cpus or usable_cpus(),
            num_gpus=usable_gpus(),
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
            **options,
        )
    for made in (folder, *folder.glob("session_2*")):
        made.chmod(0o700)  # Ray makes them 0777


def environment(prefix: str) -> dict[str, str]:
    """What the processes of a private cluster have in their environment. prefix: where the packages lie."""
    return _ENVIRONMENT | (_NO_COMPILER if len(prefix.split()) > 1 else {})


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """What starts in this context has its temporary files in `folder`.

    Libraries of the workers use names there that anybody can guess, and load code from some of them.
    """
    folder.mkdir(mode=0o700)
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before


def reread_authentication() -> None:
    """Make Ray look at RAY_AUTH_MODE and RAY_AUTH_TOKEN again. It keeps what they were when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def usable_cpus() -> int:
    """CPUs that this process may use by its affinity and its control group's quota, rounded down, but at least 1."""
    from ray._private.utils import _get_docker_cpus

    quota = _get_docker_cpus()
    allowed = len(os.sched_getaffinity(0))
    return max(1, int(allowed if quota is None else min(quota, allowed)))


def usable_gpus() -> int | None:
    """0 if this environment's torch is built for CPUs only, as that of `make setup` is; None: what Ray finds.

    Otherwise a laptop with a GPU would be asked for one for every learner and rollout actor.
    """
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    if not version("torch").endswith("+cpu"):
        return None
    if found := NvidiaGPUAcceleratorManager.get_current_node_num_accelerators():
        print(
            f"not using {found} GPU(s): torch is built for CPUs here (docs/cluster.md says how to change it)",
            flush=True,
        )
    return 0


def own_session(folder: Path) -> Path:
    """A new folder in `folder` that stays locked until this process ends. Removes those that nobody holds any more."""
    with _locked(folder):
        dead = [(path, lock) for path in _sessions(folder) if (lock := _try_lock(path)) is not None]
        while True:
            own = folder / f"s{secrets.token_hex(2)}"
            if not own.exists():
                break
        own.mkdir(mode=0o700)
        lock = _try_lock(own)
        assert lock is not None
        _held.append(lock)
    for path, descriptor in dead:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now may be at the next start
        os.close(descriptor)
    return own


def _sessions(folder: Path) -> list[Path]:
    return [
        Path(entry.path)
        for entry in os.scandir(folder)
        if _SESSION.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, which ends with the process. None if another has it or removed it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    deadline = time.monotonic() + _LOCK_DEADLINE_S
    while (descriptor := _try_lock(folder)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: another process has held its lock for {_LOCK_DEADLINE_S:g} s")
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)
