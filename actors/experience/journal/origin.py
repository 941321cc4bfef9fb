"""What entries of the journal depend on besides their inputs: code, packages, weights on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import actors.experience
import deepgen
import rewards
from deepgen.cluster.own_environment import own_environment
from deepgen.config import PoolSettings
from deepgen.fingerprint import fingerprint

JOURNAL = "journal"  # folder in the run folder
_PACKAGES = (actors.experience, deepgen, rewards)  # whose code decides what is drawn, and how it is scored
# Keys of a pool that change no score.
_HOW_ASKED = {"replicas", "deadline_s", "retries", "required"}


@cache
def code_version() -> str:
    """Hash of our code and of the names and versions of all installed packages: both change what is drawn.

    A change that draws the same, in a comment say, costs one time of drawing again.
    """
    digest = hashlib.blake2b(digest_size=16)
    for package in _PACKAGES:
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    # Folders called like "torch-2.5.1.dist-info". To ask importlib.metadata would read 250 files.
    installed = {found.name for folder in sys.path for found in Path(folder).glob("*.dist-info")}
    digest.update(json.dumps([sys.version, sorted(installed)]).encode())
    return digest.hexdigest()


def hash_of(*facts: Any) -> str:
    """Hash of JSON values, 32 hex digits."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def scorer_hash(pool: PoolSettings) -> str:
    """Hash of all that decides a pool's scores: class and its code, options, the files and folders that it reads."""
    options = pool.model_dump(mode="json", exclude=_HOW_ASKED)
    source = inspect.getsourcefile(pool.reward_class())
    code = hashlib.blake2b(Path(source).read_bytes() if source else b"").hexdigest()
    read = {name: fingerprint(path) for name, path in pool.input_paths().items()}
    own = own_environment(pool)
    return hash_of(options, code, read, code_version(), own.folder.name if own else "")
