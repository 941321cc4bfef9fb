"""A rollout actor: holds the policy without gradients and samples one group per call.

The images of a group stay in the object store until the rewards read them, its trajectory until a learner rank does. A
group depends only on the policy version, the run's seed, and its own prompt, epoch and step. Any actor can sample it
again and gets the same bits, or finds them in the journal (`experience.journal`). Left out: several groups in one
forward, which would make a group depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import ray

from actors.experience.journal.group_journal import GroupJournal
from actors.experience.reward_requests import held_out_weights, make_requests, request_key, reward_weights
from actors.experience.step_metrics import group_diversity
from actors.messages import Arrays, EvaluationReply, EvaluationRequest, Group, PolicyWeights
from deepgen.config import Settings
from deepgen.monitoring.log_lines import Speaker, set_up_logs
from rewards import RewardRequest

if TYPE_CHECKING:
    from actors.experience.policy.policy_version import LoadedPolicy

Pictures = tuple[bytes | str, ...]  # as in `Record.references`


class RolloutActor:
    """Runs in a Ray actor of its own. Calls to `prefetch` may overlap the others (concurrency group "weights")."""

    def __init__(self, settings: Settings, name: str) -> None:
        set_up_logs(Speaker("rollout", name, run=settings.run.name))
        self.name = name
        self._settings = settings

    def ready(self) -> str:
        """Load the model and return the node that this actor is on. Call it first, and again after a restart.

        The constructor does not load the model, because Ray would wrap a loading error in an exception of its own.
        """
        assert self._policy is not None
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @cached_property
    def _policy(self) -> LoadedPolicy:
        from actors.experience.policy.policy_version import (
            LoadedPolicy,
        )  # late: the process that starts actors has no torch

        return LoadedPolicy(self._settings)

    @cached_property
    def _journal(self) -> GroupJournal | None:
        if not self._settings.experience.journal:
            return None
        return GroupJournal(self._settings, self.name, self._policy.kernels())

    def prefetch(self, published: PolicyWeights) -> None:
        """Fetch a policy version into this process; the next call that needs it loads it into the model."""
        self._policy.prefetch(published)

    def sample_group(
        self, group: Group, policy: PolicyWeights | None, references: Pictures = ()
    ) -> tuple[Group, list[RewardRequest], Arrays]:
        """The group, what its rewards are asked, and its packed trajectory (`unpack_samples`), as three Ray objects.

        Only the first one, which is small, goes to the stream. `policy` is the version to sample with; None means the
        weights folder that the run started from. `references`: the source pictures of the group's record.
        """
        version = self._policy.use(policy)
        whole = replace(group, record=replace(group.record, references=references))
        draw, journal = self._policy.sampler.sample_group, self._journal
        images, arrays = journal.drawn(whole, self._policy.checksum(), draw) if journal else draw(whole)
        requests = make_requests(whole.record, images)
        drawn = replace(
            group,
            version=version,
            reward_weights=reward_weights(self._settings.rewards, group.record, requests[0], group.step),
            held_out_weights=held_out_weights(self._settings.rewards, requests[0]),
            keys=tuple(map(request_key, requests)),
            journal=journal.news() if journal else None,
            diversity=group_diversity(arrays["trajectory/final"]),
        )
        return drawn, requests, arrays

    def evaluate(
        self, request: EvaluationRequest, policy: PolicyWeights | None
    ) -> tuple[EvaluationReply, list[RewardRequest]]:
        """The images of the prompts, in order, inside of what the rewards are asked about them; as two Ray objects."""
        if request.folder is None:
            self._policy.use(policy)
        else:
            self._policy.read(request.folder, None if request.averaged else policy)
        drawn = zip(request.drawing.records, self._policy.sampler.draw(request.drawing), strict=True)
        by_prompt = [(record, make_requests(record, images)) for record, images in drawn]
        requests = list(chain.from_iterable(asked for _, asked in by_prompt))
        rewards = self._settings.rewards
        weights = np.stack([reward_weights(rewards, record, first, None) for record, (first, *_) in by_prompt])
        held_out = np.stack([held_out_weights(rewards, first) for _, (first, *_) in by_prompt])
        return EvaluationReply(tuple(map(request_key, requests)), weights, held_out), requests
