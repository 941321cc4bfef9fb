"""A virtual environment of a reward's own, for one whose libraries clash with ours.

    rewards.NAME.environment ─▶ folder on each node, made by pip once ─▶ Ray's runtime_env: py_executable of the actor

Ray's own `pip` and `uv` plugins copy the whole virtual environment that Ray runs in (several GB) for every such
environment and every cluster. Here the new one lies on top of ours: what pip installs comes first on its path, then the
packages that are here. It stays in the user's cache folder for later runs. Left out: removing old ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen.config import PoolSettings
from deepgen.config.schema.paths import CHECKOUT, exists
from deepgen.errors import UserError
from deepgen.fingerprint import fingerprint
from deepgen.masking import masked

_READY = "ready"  # a file that says that pip is done
_SAID, _LETTERS = 3, 600  # of what pip said last, in errors
# "$0" and "$@" are Ray's own arguments for the worker. Where the environment is not made yet, ours makes it.
_START = 'p={plain}; if [ -e {ready} ]; then p={own}; fi; exec "$p" "$0" "$@"'


@dataclass(frozen=True)
class OwnEnvironment:
    """The environment that a reward runs in. key: its setting. lines: as in a requirements file of pip.

    folder, python: where it lies, and the Python that makes it. Both are the same on every node.
    """

    key: str
    lines: tuple[str, ...]
    folder: Path
    python: Path

    def runtime_env(self) -> dict[str, str]:
        """For Ray: processes of this environment where the node has it, of the usual one where not."""
        parts = {"plain": self.python, "ready": self.folder / _READY, "own": self._own_python}
        script = _START.format_map({name: shlex.quote(str(path)) for name, path in parts.items()})
        return {"py_executable": f"sh -c {shlex.quote(script)}"}

    def is_here(self) -> bool:
        """Whether this process runs in it."""
        return Path(sys.prefix) == self.folder

    def make(self, deadline_s: float) -> None:
        """Make it on this node, unless it is there. Waits for another process that is doing so.

        Raises UserError with the last lines of pip if it cannot be made within `deadline_s`.
        """
        ends = time.monotonic() + deadline_s
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(ends) as lock:
                if (self.folder / _READY).exists():
                    return
                shutil.rmtree(self.folder, ignore_errors=True)
                print(f"{self.key}: making {self.folder} with pip, once on each node", flush=True)
                self._create()
                self._install(ends, lock)
                (self.folder / _READY).touch()
        except OSError as error:
            raise UserError(f"{self.key}: cannot make {self.folder}: {error.strerror or error}") from error

    @property
    def _own_python(self) -> Path:
        return self.folder / "bin" / "python"

    def _create(self) -> None:
        """An empty environment that sees our packages behind its own."""
        venv.EnvBuilder(symlinks=True).create(self.folder)
        (below,) = self.folder.glob("lib/python*/site-packages")
        ours = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())
        (below / "deepgen_below.pth").write_text(ours, encoding="utf-8")

    def _install(self, ends: float, lock: int) -> None:
        wanted = [part for line in self.lines for part in _words(line)]
        command = [str(self._own_python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *wanted]
        # pip would take what lies in these folders for installed packages.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        said = self.folder.with_suffix(".log")
        with said.open("w", encoding="utf-8") as output:
            left = max(0.0, ends - time.monotonic())
            # It holds the lock, too: should this process die, nobody else begins before pip has ended.
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            where: dict[str, Any] = {"cwd": CHECKOUT, "env": environment, "pass_fds": [lock]}
            try:
                code = subprocess.run(command, check=False, timeout=left, **streams, **where).returncode
            except subprocess.TimeoutExpired:
                what = "was not done in time (cluster.start_deadline_s)"
            else:
                if code == 0:
                    return
                what = f"ended with {code}"
        shutil.rmtree(self.folder, ignore_errors=True)
        raise UserError(
            f"{self.key}: pip could not install {', '.join(self.lines)}: it {what}; its last lines: {_last(said)}; "
            f"all of them: {said}; allowed: lines of a requirements file"
        )

    @contextmanager
    def _locked(self, ends: float) -> Iterator[int]:
        """Hold the lock on the folder. Yields its descriptor."""
        with self.folder.with_suffix(".lock").open("wb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > ends:
                        raise UserError(
                            f"{self.key}: another process is still making {self.folder} (cluster.start_deadline_s)"
                        ) from None
                    time.sleep(0.1)
            yield file.fileno()


def own_environment(pool: PoolSettings) -> OwnEnvironment | None:
    """The environment of a pool's reward; None if it runs in ours.

    Its folder's name is a hash of all that decides what is in it: the lines and the files that they name, and our
    packages below it. So ask for it in one of our processes, not in one that runs in it.
    """
    if not pool.environment:
        return None
    key = pool.dotted("environment")
    words = [word for line in pool.environment for word in _words(line, key)]
    files = [(CHECKOUT or Path()) / word for word in words if os.sep in word or word.endswith((".txt", ".whl"))]
    read = [fingerprint(file) for file in files if exists(file)]
    ours = sorted({found.name for folder in site.getsitepackages() for found in Path(folder).glob("*.dist-info")})
    facts = json.dumps([pool.environment, read, sys.version, sys.prefix, ours])
    name = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder = cache / "deepgen" / "environments" / name
    return OwnEnvironment(key, tuple(pool.environment), folder, Path(sys.executable))


def _words(line: str, key: str = "") -> list[str]:
    """A line of a requirements file as arguments of pip: an option may have a value. Raises UserError naming `key`."""
    if not line.startswith("-"):
        return [line]
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"{key}: got {line!r}: {error}; allowed: lines of a requirements file") from error


def _last(file: Path) -> str:
    """What pip said last, in one line, without secrets. Its errors if it said some."""
    lines = [line for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if (line := text.strip())]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return masked(" | ".join((errors or lines)[-_SAID:]))[:_LETTERS]
