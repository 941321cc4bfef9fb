"""A rollout actor: the policy without gradients, which samples one group a call.

The images of a group go to the rewards; its trajectory stays in the object store until a learner rank asks for it. A
group depends on the policy version, the run's seed, its prompt, epoch and step only: sampled again, on any actor, it
is the same to the bit. Left out: several groups in one forward, which would make a group depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from actors.messages import Arrays, EvaluationRequest, Group, PolicyWeights
from deepgen.config import Settings

if TYPE_CHECKING:
    from actors.experience.policy_version import LoadedPolicy


class RolloutActor:
    """Runs in a Ray actor of its own; calls to `prefetch` may overlap the others (concurrency group "weights")."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self._settings = settings

    def ready(self) -> str:
        """Name of this actor, once its model is loaded; to be called first, and again after a restart.

        The model is not loaded when the actor is made, where Ray would wrap up what is wrong with it.
        """
        assert self._policy is not None
        return self.name

    @cached_property
    def _policy(self) -> LoadedPolicy:
        from actors.experience.policy_version import LoadedPolicy  # the model's libraries: not for who starts actors

        return LoadedPolicy(self._settings)

    def prefetch(self, published: PolicyWeights) -> None:
        """Bring a policy version to this process; the next call that wants it loads it."""
        self._policy.prefetch(published)

    def sample_group(self, group: Group, policy: PolicyWeights | None) -> tuple[Group, Arrays]:
        """The group with its images, and its packed trajectory (`unpack_samples`), as two Ray objects.

        `policy` is the version to sample with, None for the weights folder that the run started from.
        """
        self._policy.use(policy)
        images, arrays = self._policy.sampler.sample_group(group)
        return replace(group, version=self._policy.version, images=images), arrays

    def evaluate(self, request: EvaluationRequest, policy: PolicyWeights | None) -> tuple[list[np.ndarray], int]:
        """Images uint8 [samples, H, W, 3] of each prompt, in order, and the policy version that drew them."""
        if request.folder is None:
            self._policy.use(policy)
        else:
            self._policy.read(request.folder, None if request.averaged else policy)
        return self._policy.sampler.evaluate(request), policy.version if policy else 0
