"""A rollout actor: the policy without gradients, which samples one group a call.

The images of a group go to the rewards; its trajectory stays in the object store until a learner rank asks for it. A
group depends on the policy version, the run's seed, its prompt, epoch and step only: sampled again, on any actor, it
is the same to the bit. Left out: several groups in one forward, which would make a group depend on its neighbours.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.experience.weight_sync import PublishedWeights, fetch_weights, load_weights, verify_weights
from deepgen.config import Settings
from deepgen.data.records import Record

if TYPE_CHECKING:
    from actors.experience.policy_sampler import PolicySampler

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class GroupRequest:
    """One group to sample: a prompt of an epoch, for a training step."""

    number: int  # position in the run's prompt order, from 0
    step: int
    epoch: int
    record: Record

    def __str__(self) -> str:
        return f"group {self.number} of step {self.step} (prompt {self.record.id!r})"


@dataclass(frozen=True)
class GroupImages:
    """What rewards need of a group."""

    images: np.ndarray  # uint8 [G, H, W, 3]
    version: int  # of the policy that drew them
    seconds: float  # of sampling and decoding


@dataclass(frozen=True)
class EvaluationRequest:
    """Held-out prompts to draw: `samples` images each, with noise from `seed` and no noise on the way (ODE).

    folder: draw with the policy in this component folder, which must be the one that was published, or `averaged`.
    """

    records: tuple[Record, ...]
    samples: int
    num_steps: int
    seed: int
    folder: Path | None = None
    averaged: bool = False

    def __str__(self) -> str:
        return f"evaluation of {len(self.records)} prompts"


class RolloutActor:
    """Runs in a Ray actor of its own; calls to `prefetch` may overlap the others (concurrency group "weights")."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self._settings = settings
        self._deadline_s = settings.experience.deadline_s
        self._folder = settings.model.weights
        self._version = 0  # what the weights folder holds
        self._read: Path | None = None  # where the policy comes from if an evaluation named another folder
        self._published: PublishedWeights | None = None
        self._lock = threading.Lock()  # guards _arrived
        self._arrived: tuple[PublishedWeights, Arrays] | None = None

    def ready(self) -> str:
        """Name of this actor, once its model is loaded; to be called first, and again after a restart.

        The model is not loaded when the actor is made, where Ray would wrap up what is wrong with it.
        """
        assert self._sampler is not None
        return self.name

    @cached_property
    def _sampler(self) -> PolicySampler:
        from actors.experience.policy_sampler import (
            PolicySampler,  # the model's libraries: not for the process that starts actors
        )

        return PolicySampler(self._settings)

    def prefetch(self, published: PublishedWeights) -> None:
        """Bring a policy version to this process; the next call that wants it loads it.

        The version that this actor started with is checked instead: the learner has read the same folder.
        """
        if self._read is None and self._published is None and published.version == self._version:
            verify_weights(self._sampler.model, published)
            self._published = published
            return
        arrays = fetch_weights(published, self._deadline_s)
        with self._lock:
            self._arrived = (published, arrays)

    def sample_group(self, request: GroupRequest, weights: PublishedWeights | None) -> tuple[GroupImages, Arrays]:
        """Sample the group's images and its packed trajectory (`unpack_group`), as two Ray objects.

        `weights` is the version to sample with, None for the weights folder the run started from.
        """
        begin = time.monotonic()
        self._use(weights)
        images, arrays = self._sampler.sample_group(request)
        return GroupImages(images, self._version, time.monotonic() - begin), arrays

    def evaluate(self, request: EvaluationRequest, weights: PublishedWeights | None) -> tuple[list[np.ndarray], int]:
        """Images uint8 [samples, H, W, 3] of each prompt, in order, and the policy version that drew them."""
        if request.folder is None:
            self._use(weights)
        elif request.folder != self._read:
            self._sampler.load(request.folder)
            self._read = request.folder
            if weights is not None and not request.averaged:
                verify_weights(self._sampler.model, weights)
        return self._sampler.evaluate(request), weights.version if weights else 0

    def _use(self, weights: PublishedWeights | None) -> None:
        """Make the policy the wanted version."""
        own, self._read = self._read is None, None
        if own and (weights == self._published or (weights is None and self._version == 0)):
            return
        if weights is None:
            self._sampler.load(self._folder)
            self._version, self._published = 0, None
            return
        if own and weights.version == self._version and self._published is None:
            verify_weights(self._sampler.model, weights)
        else:
            with self._lock:
                arrived, self._arrived = self._arrived, None
            if arrived is None or arrived[0] != weights:
                arrived = weights, fetch_weights(weights, self._deadline_s)
            load_weights(self._sampler.model, arrived[1], weights)
        self._version, self._published = weights.version, weights
