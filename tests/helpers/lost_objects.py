"""References to objects that are gone, as after the death of a node."""

from __future__ import annotations

import time
from typing import Any

import ray

DEADLINE_S = 60.0


class Owner:
    """An object is lost with its owner, too."""

    def put(self) -> list[Any]:
        return [ray.put(["gone"])]


def lost_reference() -> Any:
    """A reference that nobody can read any more. Ray must be connected."""
    owner = ray.remote(Owner).options(num_cpus=0.1).remote()
    (reference,) = ray.get(owner.put.remote(), timeout=DEADLINE_S)
    ray.kill(owner)
    begin = time.monotonic()
    while time.monotonic() - begin < DEADLINE_S:
        try:
            ray.get(reference, timeout=DEADLINE_S)
        except ray.exceptions.ObjectLostError:
            return reference
        time.sleep(0.05)
    raise TimeoutError(f"an object outlived its owner by {DEADLINE_S:.0f} s")
