"""Joins a Ray cluster, or starts one on this machine.

A submitted job (`ray job submit`) and a shell with RAY_ADDRESS join that cluster. Otherwise a private cluster starts
and ends with the program (`deepgen.cluster.private`). Left out: Ray Client (`ray://`); Ray Train does not support it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from deepgen.cluster.authentication import check_reachable, use_what_it_takes
from deepgen.cluster.private import start_private
from deepgen.cluster.resources import Need, check_capacity, cluster_capacity, learner_needs
from deepgen.config import Settings, UserError
from deepgen.errors import stop_on_sigterm
from deepgen.machine import prepare_process, reach_directly

AUTO_LOCAL = "auto-local"
QUIET_ENVIRONMENT = {
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
    prepare_process()
    address = _address(settings)
    try:
        if address == "local":
            _prepare_private(settings, code_root)
            start_private(settings.cluster.num_cpus, log_to_driver=True)
        else:
            _join(address, code_root)
    except UserError:
        raise
    except Exception as error:  # not to be narrowed: where a start takes too long, Ray raises just that
        what = "start a Ray cluster here" if address == "local" else f"join a Ray cluster at {address}"
        raise UserError(f"cluster.address: cannot {what}: {_first_line(error)}") from error


def _address(settings: Settings) -> str:
    if settings.cluster.address != AUTO_LOCAL:
        return settings.cluster.address
    return os.environ.get("RAY_ADDRESS") or "local"


def _join(address: str, code_root: Path | None) -> None:
    import ray

    if address != "auto":
        reach_directly([check_reachable(address)])
        use_what_it_takes(address)
    environment = {}
    if code_root is not None and not _submitted():
        environment = {"runtime_env": {"env_vars": {"PYTHONPATH": str(code_root)}}}
    ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, **environment)


def _submitted() -> bool:
    """Whether Ray started this program as a job. The job's own runtime environment then says where the code is."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _prepare_private(settings: Settings, code_root: Path | None) -> None:
    """Set what the processes of a private cluster inherit."""
    if code_root is not None:
        # So workers find the checkout whatever the working folder is.
        paths = [str(code_root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if settings.experience.max_staleness or settings.overlap().pieces:
        # The learner shares cores with actors that work at the same time. A thread that spins while it waits for its
        # siblings takes the core that they need. (Where it has the cores for itself, spinning is faster.)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
