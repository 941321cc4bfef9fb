"""What a call of an actor raises when the actor's process is gone."""

from __future__ import annotations

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

# A process that Ray's memory monitor has killed is an `OutOfMemoryError`, which is no `RayActorError`.
GONE = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
