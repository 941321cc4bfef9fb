"""A PostgreSQL of a test's own, and an MLflow server on it."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.servers import free_port

WAIT_S = 90.0


def missing() -> str:
    """What this machine lacks for it; "" if nothing."""
    if _programs() is None:
        return "needs PostgreSQL (Debian: postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "needs psycopg (pip install '.[postgres]')"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres"
    return ""


def _programs() -> Path | None:
    """The folder of Debian's newest, or of what is on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    other = shutil.which("initdb")
    return found[-1].parent if found else Path(other).parent if other else None


def _user() -> int | None:
    return next((one.pw_uid for one in pwd.getpwall() if one.pw_name == "postgres"), None)


@contextmanager
def database() -> Iterator[str]:
    """The address of an empty database with a password, on 127.0.0.1."""
    programs = _programs()
    assert programs is not None
    folder, port, password = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp")), free_port(), secrets.token_hex(8)
    (folder / "password").write_text(password)
    options: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL}
    if os.geteuid() == 0:
        options["user"] = user = _user()
        for path in (folder, folder / "password"):
            os.chown(path, user or 0, -1)
    initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "mlflow", "--auth=scram-sha-256"]
    subprocess.run([*initdb, f"--pwfile={folder / 'password'}", "--no-sync", "-E", "UTF8"], check=True, **options)
    server = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-h", "127.0.0.1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*server, "-k", str(folder), "-F"], stderr=log, **options)
    try:
        _wait(lambda: b"ready to accept" in (folder / "log").read_bytes(), "PostgreSQL", process)
        yield f"postgresql://mlflow:{password}@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(folder: Path, address: str, port: int) -> Iterator[str]:
    """A server as in docs/mlflow.md, with its files in `folder`. Yields its address."""
    # The password is in the environment, where `ps` does not show it.
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": address, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(lambda: _healthy(port), f"MLflow (see {folder / 'mlflow.log'})", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # it and its workers
        process.wait(30)


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _wait(ready: Any, what: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + WAIT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > ends:
            raise TimeoutError(f"{what}: not ready within {WAIT_S:g} s, or ended ({process.returncode})")
        time.sleep(0.1)
