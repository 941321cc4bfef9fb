"""Joins a Ray cluster, or starts one on this machine.

A submitted job (`ray job submit`) and a shell with RAY_ADDRESS join that cluster. Otherwise a private cluster starts
and ends with the program. Left out: Ray Client (`ray://`), which Ray Train does not support.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepgen.cluster.resources import Need, check_capacity, cluster_capacity, learner_needs
from deepgen.config import Settings, UserError
from deepgen.errors import stop_on_sigterm

AUTO_LOCAL = "auto-local"
# Ray puts sockets under its temporary folder; Linux allows 107 characters for a socket's whole path.
MAX_TEMP_DIR = 40
REACH_DEADLINE_S = 10.0

QUIET_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # token authentication stays on, for our clusters and for those we join
    "RAY_DEDUP_LOGS": "0",  # lines of different actors look alike but are all wanted
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about CUDA_VISIBLE_DEVICES
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Every actor loads models; progress bars and messages of the libraries would bury our lines.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def connect(
    settings: Settings,
    needs: Callable[..., Sequence[Need]] = learner_needs,
    *,
    code_root: Path | None = None,
) -> bool:
    """Connect this process to Ray and check that the cluster has what the run needs. Returns whether it has GPUs.

    `needs(settings, gpus=...)` lists the needs: `learner_needs` or `rl_needs`. `code_root` is the checkout whose
    packages the workers import when no working_dir was submitted (default: the working folder). Raises UserError if the
    cluster cannot be reached or is too small.
    """
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if not ray.is_initialized():
        _join_or_start(settings, code_root)
        stop_on_sigterm()
    capacity = cluster_capacity()
    gpus = capacity.total.get("GPU", 0) > 0
    check_capacity(needs(settings, gpus=gpus), capacity)
    return gpus


def _join_or_start(settings: Settings, code_root: Path | None) -> None:
    import ray

    address = _address(settings)
    _check_reachable(address)
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address == "local":
        options |= _local_options(settings, code_root)
    elif code_root is not None and not _submitted():
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(code_root)}}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cluster.address: cannot join a Ray cluster at {address}: {_first_line(error)}") from error


def _address(settings: Settings) -> str:
    if settings.cluster.address != AUTO_LOCAL:
        return settings.cluster.address
    return os.environ.get("RAY_ADDRESS") or "local"


def _check_reachable(address: str) -> None:
    """Raise UserError unless a server listens at host:port. Ray itself would end the process, without an exception."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise UserError(
            f"cluster.address: got {address!r}; allowed: auto-local, local, auto, or HOST:PORT of a head node"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_DEADLINE_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cluster.address: no Ray cluster answers at {address} ({reason})") from error


def _submitted() -> bool:
    """Whether Ray started this program as a job. The job's own runtime environment then says where the code is."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _local_options(settings: Settings, code_root: Path | None) -> dict[str, Any]:
    """Options of a private cluster on this machine."""
    if code_root is not None:
        # Ray's processes inherit the environment, so workers find the checkout whatever the working folder is.
        paths = [str(code_root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if settings.experience.max_staleness or settings.overlap().pieces:
        # The learner shares cores with actors that work at the same time. A thread that spins while it waits for its
        # siblings takes the core that they need. (Where it has the cores for itself, spinning is faster.)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options: dict[str, Any] = {"include_dashboard": False, "_temp_dir": _temp_dir()}
    if settings.cluster.num_cpus:
        options["num_cpus"] = settings.cluster.num_cpus
    return options


def _temp_dir() -> str:
    """Folder for Ray's sockets and logs: RAY_TMPDIR, or one per user, so that users do not collide."""
    folder = os.environ.get("RAY_TMPDIR") or str(Path(tempfile.gettempdir()) / f"deepgen-ray-{os.getuid()}")
    if len(folder) > MAX_TEMP_DIR and sys.platform != "win32":
        raise UserError(
            f"RAY_TMPDIR: {folder} has {len(folder)} characters, but Ray's sockets leave room for {MAX_TEMP_DIR}; "
            "set RAY_TMPDIR to a shorter folder, e.g. /tmp/ray"
        )
    return folder


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
