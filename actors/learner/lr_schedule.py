"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepgen.config.settings import Settings


def learning_rate(settings: Settings, step: int) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, then constant, or half a cosine down to the minimum (M2.2)."""
    train = settings.train
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    span = train.learning_rate - train.min_learning_rate
    return train.min_learning_rate + span * (1 + math.cos(math.pi * done)) / 2
