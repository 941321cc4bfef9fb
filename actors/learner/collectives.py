"""What the learner's ranks exchange apart from gradients."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T, world: int) -> list[T]:
    """Collect the value of every rank, ordered by rank. Collective."""
    everyone = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    return everyone
