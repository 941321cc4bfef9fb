"""Every type that travels between the processes of a run.

One group of samples keeps one type on its whole way, `Group`: stream → rollout actor → stream → rewards → learner.
Types of the library (`Record`, `Settings`, `Evaluation`, the rewards' `RewardRequest`) travel inside these or beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgen.config import Settings
from deepgen.data.records import Record

Arrays = dict[str, np.ndarray]
Filled = Any  # an array once its step of the way is done, None before


# -- generate → score → advantage ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One prompt and its G samples, from the request to the update. What is not there yet is None."""

    # asked for by the stream
    number: int  # position in the run's prompt order, from 0
    step: int  # training step that the samples are for
    epoch: int
    record: Record  # on the way to the learner without its pictures
    # drawn by a rollout actor
    version: int | None = None  # of the policy
    images: Filled = None  # uint8 [G, H, W, 3]; until they are scored
    trajectory: Filled = None  # Ray reference to `pack_samples`' arrays; the learner replaces it by these
    # scored by the rewards
    scores: Filled = None  # float32 [G, K], NaN where missing or not asked for
    # compared with the other groups of the step
    advantages: Filled = None  # float32 [G]

    def __str__(self) -> str:
        return f"group {self.number} of step {self.step} (prompt {self.record.id!r})"


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a step, and figures of the whole step. Stream → learner."""

    groups: tuple[Group, ...]
    metrics: dict[str, float]
    tally: dict[str, tuple[int, int, float]]  # reward -> scores had, scores missing, their sum


@dataclass(frozen=True)
class EvaluationRequest:
    """Held-out prompts to draw: `samples` images each, with noise from `seed` and no noise on the way (ODE).

    folder: draw with the policy in this component folder, which must be the one that was published, or `averaged`.
    Stream → rollout actor.
    """

    records: tuple[Record, ...]
    samples: int
    num_steps: int
    seed: int
    folder: Path | None = None
    averaged: bool = False

    def __str__(self) -> str:
        return f"evaluation of {len(self.records)} prompts"


@dataclass(frozen=True)
class BatchReply:
    """What a replica of a reward answers: a score a request, or the reason why there are none. Reward actor → pool."""

    values: list[float | None]
    unavailable: str | None = None


# -- update → sync ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyWeights:
    """One version of the policy's trained weights. Learner → stream → rollout actors.

    `refs` are Ray references, each to a dict name -> float32 array; `names` are all of them.
    """

    version: int
    checksum: str
    names: tuple[str, ...]
    refs: tuple[Any, ...]


@dataclass(frozen=True)
class LearnerJob:
    """One run of the learner. ``build`` makes source and objective inside each worker; it is pickled by reference."""

    stage: str
    settings: Settings
    build: Callable[[Any], Any]  # WorkerContext -> Parts, see `actors.learner.protocols`
    gpus: bool
