"""A rollout actor: holds the policy without gradients and samples one group per call.

The images of a group go to the rewards; its trajectory stays in the object store until a learner rank fetches it. A
group depends only on the policy version, the run's seed, and its own prompt, epoch and step. Any actor can sample it
again and gets the same bits. Left out: several groups in one forward, which would make a group depend on its
neighbours.
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
    """Runs in a Ray actor of its own. Calls to `prefetch` may overlap the others (concurrency group "weights")."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self._settings = settings

    def ready(self) -> str:
        """Load the model and return this actor's name. Call it first, and again after a restart.

        The constructor does not load the model, because Ray would wrap a loading error in an exception of its own.
        """
        assert self._policy is not None
        return self.name

    @cached_property
    def _policy(self) -> LoadedPolicy:
        from actors.experience.policy_version import LoadedPolicy  # late: the process that starts actors has no torch

        return LoadedPolicy(self._settings)

    def prefetch(self, published: PolicyWeights) -> None:
        """Fetch a policy version into this process; the next call that needs it loads it into the model."""
        self._policy.prefetch(published)

    def sample_group(self, group: Group, policy: PolicyWeights | None) -> tuple[Group, Arrays]:
        """The group with its images, and its packed trajectory (see `unpack_samples`), as two Ray objects.

        `policy` is the version to sample with; None means the weights folder that the run started from.
        """
        version = self._policy.use(policy)
        images, arrays = self._policy.sampler.sample_group(group)
        return replace(group, version=version, images=images), arrays

    def evaluate(self, request: EvaluationRequest, policy: PolicyWeights | None) -> tuple[list[np.ndarray], int]:
        """Images uint8 [samples, H, W, 3] of each prompt, in order, and the policy version that drew them."""
        if request.folder is None:
            self._policy.use(policy)
        else:
            self._policy.read(request.folder, None if request.averaged else policy)
        return self._policy.sampler.evaluate(request), policy.version if policy else 0
