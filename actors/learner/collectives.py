"""What the learner's ranks tell each other beside gradients."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T, world: int) -> list[T]:
    """What every rank has given, by rank; collective."""
    everyone = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    return everyone
