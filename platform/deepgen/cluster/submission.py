"""Submits a program as a job to a Ray cluster, after checks whose errors Ray would spread over a traceback or a log.

What is sent is what Ray's own command sends (`ray job submit --working-dir . --runtime-env FILE -- ...`): a zip of the
folder without what `excludes`, .gitignore and .rayignore name. It has to fit into one message, and the cluster keeps it
in the memory of its head node.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deepgen.errors import UserError
from deepgen.monitoring.variables import COMMIT
from deepgen.tracking.provenance import UNKNOWN, git_state

CALL_S = 20.0
SHOWN = 8  # largest files that an error names


def check_dashboard(address: str) -> str:
    """The base address of a dashboard to which jobs can be sent; uses a token if it wants one.

    Raises UserError in one line: no address of a dashboard, nothing there, another program, a missing or wrong token,
    another version of Ray.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        host = (parts.hostname if parts.scheme == "ray" else address.partition(":")[0]) or "HOST"
        raise UserError(
            f"--address: got {address!r}; allowed: that of the head's dashboard, as in http://{host}:8265 (the port of "
            "`ray start --address` and of cluster.address is another one)"
        )
    base = address.rstrip("/")
    status, content = _version(base, {})
    if status in (401, 403):
        header = _token_header(base)
        status, content = _version(base, header)
        if status in (401, 403):
            raise UserError(f"--address: the cluster at {base} refuses the token that is here; allowed: its own")
    theirs = content.get("ray_version")
    if status != 200 or not theirs:
        raise UserError(f"--address: what answers at {base} is no dashboard of Ray (status {status})")
    import ray

    if theirs != ray.__version__:
        raise UserError(
            f"--address: the cluster at {base} has Ray {theirs}, here is {ray.__version__}; allowed: the same"
        )
    return base


def read_environment(file: Path, folder: Path) -> dict[str, Any]:
    """The runtime environment of a job whose code is `folder`: that of a YAML file, the folder, and its git commit."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env: cannot read {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--runtime-env: {file} holds no mapping")
    variables = content.get("env_vars", {}) | ({COMMIT: commit} if (commit := git_commit(folder)) else {})
    return content | {"working_dir": str(folder), "env_vars": variables}


def git_commit(folder: Path) -> str:
    """The commit of a checkout, with "-dirty" if it was changed; "" where git does not say."""
    state = git_state(folder)
    if state["git.commit"] == UNKNOWN:
        return ""
    return state["git.commit"] + ("-dirty" if state["git.dirty"] == "true" else "")


def package_size(environment: dict[str, Any], limit: int | None = None) -> int:
    """Bytes of the zip that is sent. Raises UserError, with the largest files, if that is more than Ray takes.

    limit: bytes; None: Ray's.
    """
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

    most = GCS_STORAGE_MAX_SIZE if limit is None else limit
    with tempfile.TemporaryDirectory() as temporary:
        made, silent = Path(temporary) / "package.zip", logging.Logger("silent", logging.CRITICAL)
        excludes = environment.get("excludes", [])
        create_package(environment["working_dir"], made, include_gitignore=True, excludes=excludes, logger=silent)
        size = made.stat().st_size
        if size < most:
            return size
        with zipfile.ZipFile(made) as archive:
            files = sorted(archive.infolist(), key=lambda file: file.compress_size, reverse=True)[:SHOWN]
    largest = ", ".join(f"{file.filename} ({file.compress_size / 2**20:.0f} MiB)" for file in files)
    raise UserError(
        f"--working-dir: {environment['working_dir']} is {size / 2**20:.0f} MiB as a zip; allowed: less than "
        f"{most / 2**20:.0f} MiB; the largest: {largest}; leave some out by excludes in the runtime environment, "
        ".gitignore or .rayignore"
    )


def submit(base: str, command: Sequence[str], environment: dict[str, Any], submission_id: str | None) -> Any:
    """Send the job. Returns Ray's client and the job's id. Raises UserError with what Ray says."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(base)
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env=environment, submission_id=submission_id)
    except (RuntimeError, ValueError, ConnectionError) as error:
        raise UserError(f"--address: {base} does not take the job: {' '.join(str(error).split())[:500]}") from error
    return client, job


def follow(client: Any, job: str) -> int:
    """Print what the job prints until it ends. Returns 0 if it succeeded, else 1."""

    async def lines() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(lines())
    info = client.get_job_info(job)
    if info.status != "SUCCEEDED" and info.message:
        print(f"job {job}: {info.status.lower()}: {info.message.strip().splitlines()[0]}", flush=True)
    return 0 if info.status == "SUCCEEDED" else 1


def _version(base: str, header: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Status and content of the dashboard's answer to who it is."""
    import requests

    try:
        reply = requests.get(f"{base}/api/version", headers=header, timeout=CALL_S, allow_redirects=False)
        content = reply.json() if reply.status_code == 200 else {}
    except requests.exceptions.JSONDecodeError:
        return reply.status_code, {}
    except requests.RequestException as error:
        raise UserError(
            f"--address: no dashboard of Ray answers at {base} ({type(error).__name__}); is it that of the head's "
            "dashboard, and does the head run?"
        ) from error
    return reply.status_code, content if isinstance(content, dict) else {}


def _token_header(base: str) -> dict[str, str]:
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

    from deepgen.cluster.authentication import WHERE
    from deepgen.cluster.private import reread_authentication

    tokens = AuthenticationTokenLoader.instance()
    if not tokens.has_token(ignore_auth_mode=True):
        raise UserError(f"--address: the cluster at {base} wants a token, here is none; allowed: its token in {WHERE}")
    os.environ["RAY_AUTH_MODE"] = "token"
    reread_authentication()
    header: dict[str, str] = tokens.get_token_for_http_header()
    return header
