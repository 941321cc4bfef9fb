"""Every type that travels between the processes of a run.

A group of samples keeps one type, `Group`, on its whole way: stream → rollout actor → stream → learner.
Library types (`Record`, `Settings`, `Evaluation`, the rewards' `RewardRequest`) travel inside these types or on their
own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.drawing.request import DrawRequest
from rewards import Missing

Arrays = dict[str, np.ndarray]
OBJECT_STORE, NIXL = "object_store", "nixl"  # how weights travel
Filled = Any  # None until the group reaches the stage that fills it


# -- generate → score → advantage ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One prompt and its G samples, from request to update. Fields that are not filled yet are None."""

    # set in the stream's request
    number: int  # position in the run's prompt order, from 0
    step: int  # training step that the samples are for
    epoch: int
    record: Record  # without its pictures, which travel by reference
    # set by the rollout actor
    version: int | None = None  # policy version that drew the samples
    reward_weights: Filled = None  # float32 [K], 0 where a reward has no weight or does not apply to the prompt
    held_out_weights: Filled = None  # as reward_weights, of the rewards that are only watched; None: there are none
    keys: Filled = None  # G keys of images with their prompts (`request_key`); dropped after scoring
    journal: Filled = None  # `JournalNews` of the actor; dropped by the stream
    requests: Filled = None  # Ray reference to the list of G `RewardRequest`s, with the images; dropped after scoring
    trajectory: Filled = None  # Ray reference to the arrays of `pack_samples`; the learner puts the arrays here
    diversity: float | None = None  # how far apart its images are (`group_diversity`); None for a single one
    # set after scoring
    scores: Filled = None  # float32 [G, K], NaN where missing or not asked for
    # computed over all groups of the step; in a group that arrives alone, its own part of them
    advantages: Filled = None  # float32 [G]

    @property
    def asked_weights(self) -> np.ndarray:
        """float32 [K]: above 0 where the reward scores this group, to train on it or only to watch it."""
        weights: np.ndarray = self.reward_weights
        return weights if self.held_out_weights is None else weights + self.held_out_weights

    def __str__(self) -> str:
        return f"group {self.number} of step {self.step} (prompt {self.record.id!r})"


@dataclass(frozen=True)
class JournalNews:
    """What a rollout actor's journal has done since its last group: counts by name, and warnings for the console."""

    counts: dict[str, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a step, and the metrics of the whole step. Stream → learner.

    For a rank that has had the groups one by one already: `factor` whitens them, and `clamped` is the largest number of
    groups with clamped advantages that a rank has.
    """

    groups: tuple[Group, ...]
    metrics: dict[str, float]
    tally: dict[str, tuple[int, int, float]]  # reward -> number of scores, missing, sum of scores
    factor: float = 1.0
    clamped: int = 0


@dataclass(frozen=True)
class EvaluationRequest:
    """Held-out prompts to draw.

    folder: component folder to load the policy from; it must hold the published version unless `averaged` is set.
    Stream → rollout actor.
    """

    drawing: DrawRequest
    folder: Path | None = None
    averaged: bool = False

    def __str__(self) -> str:
        return f"evaluation of {len(self.drawing.records)} prompts"


@dataclass(frozen=True)
class EvaluationReply:
    """What a rollout actor says about N evaluation images; the list of `RewardRequest`s with them follows by reference.

    keys: as in `Group`, N in the order of the images, the samples of a prompt side by side.
    reward_weights, held_out_weights: as in `Group`, float32 [prompts, K].
    """

    keys: tuple[bytes | None, ...]
    reward_weights: np.ndarray
    held_out_weights: np.ndarray


@dataclass(frozen=True)
class BatchReply:
    """A reward replica's answer: for each request its score or why it has none. Reward actor → pool.

    unavailable: why the reward could not score any of them now; None if it could. after_s: when to ask again. broken:
    why this process can score nothing any more. version: of the reward, as `rewards.base.Reward` says; None where its
    settings decide.
    """

    values: list[float | Missing]
    unavailable: str | None = None
    after_s: float = 0.0
    broken: str | None = None
    version: str | None = None


# -- update → sync ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canary:
    """What a policy says about one fixed transition, see `actors.experience.policy.canary`. Travels in `PolicyWeights`.

    `kernels` names what rounded the sums; two equal names must give equal bits.
    """

    log_prob: float
    kernels: str | None


@dataclass(frozen=True)
class PolicyWeights:
    """One version of the policy's trained weights. Learner → stream → rollout actors.

    `refs` are Ray references to dicts name -> float32 array (nixl: tensor); `names` lists the names in all of them.
    `checksum` is that of version, names, shapes and values. `transport`: as in `experience.transport`.
    """

    version: int
    checksum: str
    names: tuple[str, ...]
    refs: tuple[Any, ...]
    canary: Canary
    transport: str = OBJECT_STORE


@dataclass(frozen=True)
class LearnerJob:
    """One run of the learner. ``build`` makes source and objective inside each worker; it is pickled by reference.

    variables: MLflow's in the environment here, address and tokens, for workers on other nodes. They go along in this
    object, because Ray writes what a runtime environment sets into its logs. Ray Train shows a job's text in Ray's
    dashboard, so neither they nor the settings are in that.
    """

    stage: str
    settings: Settings = field(repr=False)
    build: Callable[[Any], Any]  # WorkerContext -> Parts, see `actors.learner.protocols`
    gpus: bool
    variables: Mapping[str, str] = field(default_factory=lambda: mlflow_variables(os.environ), repr=False)


def mlflow_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("MLFLOW_")}
