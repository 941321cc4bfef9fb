"""What a container may lack: a home folder, a name of its user, CPUs, a way round the proxy; and a folder of one's own.

Libraries ask for these all over (caches in ~/.cache, getpass.getuser, calls to 127.0.0.1), so a program sets them
once, in its environment, which a cluster of its own inherits.
"""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from deepgen.errors import UserError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def prepare_process() -> None:
    """Give this process and its children a home, a user name, and direct ways to this machine. Harmless when repeated.

    Raises UserError if there is no usable home and no temporary folder for one.
    """
    if not _has_home():
        home = private_folder() / "home"
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no name for this user id: usual where a container runs as a random user
        os.environ["USER"] = f"user-{os.geteuid()}"
    reach_directly(_LOOPBACK)


def _has_home() -> bool:
    try:
        with tempfile.TemporaryFile(dir=Path.home()):
            return True
    except (OSError, RuntimeError):
        return False


def reach_directly(hosts: Iterable[str]) -> None:
    """Except these hosts from the proxies of the environment, if it has any."""
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return
    for name in ("no_proxy", "NO_PROXY"):
        given = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*given, *hosts]))


def private_folder(room: int | None = None) -> Path:
    """The folder that only this user can enter, in RAY_TMPDIR or the temporary folder. It is made if it is not there.

    room: most letters of its path; None is no limit. Raises UserError if it is too long, cannot be made, or is not
    this user's own: another user who has made it could read and replace what is written there.
    """
    folder = _place(room) / f"deepgen-{os.geteuid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise UserError(
                f"{folder}: is user {found.st_uid}'s or no folder, and what is kept there must be safe from others; "
                "remove it, or set RAY_TMPDIR to another folder"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made or used ({error.strerror or error}); set RAY_TMPDIR to a folder to write to, "
            "of a short name"
        ) from error
    return folder


def _place(room: int | None) -> Path:
    """Where the private folder goes: RAY_TMPDIR, or the first temporary folder of a path that is short enough."""
    given = os.environ.get("RAY_TMPDIR")
    limit = None if room is None else room - len(f"/deepgen-{os.geteuid()}")
    try:
        places = [os.path.abspath(given)] if given else [tempfile.gettempdir(), "/tmp"]
    except FileNotFoundError as error:
        raise UserError(f"TMPDIR: {error}; set it to a folder to write to, of a short name") from error
    for place in places:
        if limit is None or len(place) <= limit:
            return Path(place)
    raise UserError(
        f"RAY_TMPDIR: {places[0]} has {len(places[0])} characters, but Ray's sockets leave room for {limit}; "
        "set RAY_TMPDIR to a shorter folder, e.g. /tmp/ray"
    )
