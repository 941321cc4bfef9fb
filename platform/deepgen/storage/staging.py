"""Where the files of a run lie whose `run.dir` is in a bucket: in a folder of this machine, its staging folder.

    s3://bucket/runs   <->   STAGING/s3/bucket/runs      STAGING: $DEEPGEN_STAGING, else deepgen/staging in the cache

Everything is written there as in any other folder; `storage.mirror` brings it to the bucket behind the run. Processes
on several nodes share a run's folder, so a cluster of several nodes needs a $DEEPGEN_STAGING that all of them see.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

VARIABLE = "DEEPGEN_STAGING"
SCHEMES = ("s3", "gs")
_ADDRESS = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[\w.-]+)(?P<prefix>(?:/[\w. +=,@-]+)*)/?", re.ASCII)


def is_bucket(given: str) -> bool:
    """Whether the text is an address in a bucket, of a kind that is known."""
    return given.partition("://")[0].lower() in SCHEMES and "://" in given


def staged(address: str) -> Path:
    """The staging folder of an address. Raises ValueError with what is wrong with it."""
    scheme, _, rest = address.partition("://")
    found = _ADDRESS.fullmatch(f"{scheme.lower()}://{rest}")
    if not found or ".." in rest.split("/"):
        allowed = f"{scheme.lower()}://BUCKET/FOLDER; credentials, region and endpoint belong in the environment"
        raise ValueError(f"which names no folder of a bucket; allowed: {allowed} (docs/buckets.md)")
    return staging_root().joinpath(found["scheme"], found["bucket"], *filter(None, found["prefix"].split("/")))


def address_of(path: Path) -> str | None:
    """The address whose staging folder this is, or None."""
    root = staging_root()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    return f"{parts[0]}://{'/'.join(parts[1:])}" if len(parts) > 1 and parts[0] in SCHEMES else None


def staging_root() -> Path:
    """The folder of all staging folders."""
    if given := os.environ.get(VARIABLE):
        return Path(os.path.abspath(given))
    home = Path(os.path.expanduser("~"))  # "~" where nobody knows one: `Path.home` would raise
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache").absolute()
    return cache / "deepgen" / "staging"
