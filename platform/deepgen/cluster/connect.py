"""Joins a Ray cluster, or starts one on this machine.

A submitted job (`ray job submit`) and a shell with RAY_ADDRESS join that cluster. Otherwise a private cluster starts
and ends with the program (`deepgen.cluster.private`). Left out: Ray Client (`ray://`); Ray Train does not support it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from deepgen.cluster.authentication import check_reachable, use_what_it_takes
from deepgen.cluster.autoscaler import Autoscaler, running_autoscaler
from deepgen.cluster.capacity import cluster_nodes, no_room, unplaced
from deepgen.cluster.private import start_private
from deepgen.cluster.resources import Need, learner_needs
from deepgen.config import Settings, UserError
from deepgen.errors import stop_on_sigterm
from deepgen.machine import prepare_process, reach_directly
from deepgen.monitoring.log_lines import DRIVER, Speaker, set_up_logs
from deepgen.monitoring.variables import HANDED_ON, METRICS, SUBMISSION
from deepgen.storage.staging import VARIABLE as STAGING
from deepgen.storage.staging import address_of

AUTO_LOCAL = "auto-local"
TELL_S = 2.0
ANY_GPU = Need("GPU", 1, {"GPU": 1}, "")
QUIET_ENVIRONMENT = {
    "RAY_DEDUP_LOGS": "0",  # lines of different actors look alike but are all wanted
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",  # the autoscaler's, of all programs since it began; `tell_growth` has those of ours
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
    set_up_logs(Speaker(DRIVER, run=settings.run.name))
    import ray

    if not ray.is_initialized():
        _join_or_start(settings, code_root)
        stop_on_sigterm()
    return find_room(settings, needs)


def find_room(settings: Settings, needs: Callable[..., Sequence[Need]]) -> bool:
    """Check that the connected cluster has room for the run, or can grow to it. Returns whether the run gets GPUs.

    Nodes that are missing start. Raises UserError with a table if there will never be room.
    """
    nodes = cluster_nodes()
    autoscaler = running_autoscaler()
    check_staging(settings, several=len(nodes) > 1 or autoscaler is not None)
    gpus = any(node.resources.get("GPU") for node in nodes)
    if gpus and not unplaced(needs(settings, gpus=True), nodes):
        return True
    if autoscaler is not None:
        gpus = gpus or autoscaler.can_provide([ANY_GPU])
    wanted = needs(settings, gpus=gpus)
    if unplaced(wanted, nodes):
        if autoscaler is None or not autoscaler.can_provide(wanted):
            line, table = no_room(wanted, nodes, grows=autoscaler is not None)
            print(table, file=sys.stderr, flush=True)
            raise UserError(line)
        print("the cluster grows to what the run needs", flush=True)
        waits = (autoscaler, wanted, settings.cluster.start_deadline_s)
        threading.Thread(target=tell_growth, args=waits, daemon=True).start()
    return gpus


def check_staging(settings: Settings, *, several: bool) -> None:
    """Raise UserError if the run lies in a bucket, and its staging folder on one node of `several`."""
    address = address_of(settings.run.dir)
    if address and several and not os.environ.get(STAGING):
        raise UserError(
            f"run.dir: got {address!r} on a cluster with several nodes; allowed: {STAGING} in the environment, a "
            "folder that every node sees, from which the run is brought to the bucket"
        )


def tell_growth(autoscaler: Autoscaler, needs: Sequence[Need], deadline_s: float) -> None:
    """Print what the autoscaler does whenever that changes, until there is room, the program ends, or it takes long."""
    import ray

    said, ends = "", time.monotonic() + deadline_s
    with suppress(ray.exceptions.RaySystemError):  # the program has left the cluster
        while time.monotonic() < ends:
            nodes = cluster_nodes()
            if not unplaced(needs, nodes):
                print(f"the cluster has room for the run: {len(nodes)} nodes", flush=True)
                return
            if (doing := autoscaler.doing()) and doing != said:
                print(said := doing, flush=True)
            time.sleep(TELL_S)


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
    variables = workers_environment(code_root)
    ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, runtime_env={"env_vars": variables})


def workers_environment(code_root: Path | None) -> dict[str, str]:
    """What the workers on a cluster of somebody else's get in their environment.

    Where Ray has started this program as a job, the job's own runtime environment says where the code is, and what it
    sets may not be set again.
    """
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job = config.get("runtime_env", {})
    ours = {key: os.environ[key] for key in (*QUIET_ENVIRONMENT, STAGING) if key in os.environ}
    ours |= {METRICS: "1"} | {key: os.environ[key] for key in HANDED_ON if key in os.environ}
    if submission := config.get("metadata", {}).get("job_submission_id"):
        ours[SUBMISSION] = submission
    if code_root is not None and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        ours["PYTHONPATH"] = str(code_root)
    return {key: value for key, value in ours.items() if key not in job.get("env_vars", {})}


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
    if str(error).startswith("Version mismatch"):  # which versions, say the next lines
        return " ".join(str(error).split())
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
