"""Tracks which weights a rollout actor's policy holds, and replaces them."""

from __future__ import annotations

import threading
from pathlib import Path

from actors.experience.policy_sampler import PolicySampler
from actors.experience.weight_sync import fetch_weights, load_weights, verify_weights
from actors.messages import Arrays, PolicyWeights
from deepgen.config import Settings


class LoadedPolicy:
    """A policy sampler together with the version of its weights.

    `prefetch` may run in a different thread from the other methods. It only fetches weights into this process; `use`
    copies them into the model before the next group. A group is therefore never sampled with a mixture of two versions.
    """

    def __init__(self, settings: Settings) -> None:
        self.sampler = PolicySampler(settings)
        self.version = 0  # 0 is the weights folder
        self._start_folder, self._deadline_s = settings.model.weights, settings.experience.deadline_s
        self._published: PolicyWeights | None = None  # the version loaded into the model or verified in it
        self._evaluated: Path | None = None  # folder whose weights the last evaluation left behind
        self._lock = threading.Lock()  # guards _arrived
        self._arrived: tuple[PolicyWeights, Arrays] | None = None  # fetched but not loaded yet

    def prefetch(self, published: PolicyWeights) -> None:
        """Fetch a version into this process.

        If the actor already holds that version from its weights folder, the weights are only verified: the learner read
        the same folder, so there is nothing to fetch.
        """
        if self._holds_start_weights() and published.version == self.version:
            verify_weights(self.sampler.model, published)
            self._published = published
            return
        arrays = fetch_weights(published, self._deadline_s)
        with self._lock:
            self._arrived = (published, arrays)

    def use(self, wanted: PolicyWeights | None) -> None:
        """Make the model hold version `wanted`; None means the weights folder that the run started from.

        Raises WeightsMismatchError if the model's weights afterwards differ from the published ones.
        """
        # Ask first: the next statement clears `_evaluated`, which the answer depends on.
        unchecked_start = self._holds_start_weights()
        # `read` replaces the weights but not `version`. After an evaluation, `version` says nothing about the model and
        # the weights have to be loaded again.
        intact, self._evaluated = self._evaluated is None, None
        # Nothing to do if the model already holds the wanted version, or if the start folder is wanted and still
        # loaded.
        if intact and (wanted == self._published or (wanted is None and self.version == 0)):
            return
        if wanted is None:
            self.sampler.load(self._start_folder)
            self.version, self._published = 0, None
            return
        if unchecked_start and wanted.version == self.version:
            verify_weights(self.sampler.model, wanted)  # same folder as the learner's: no copy
        else:
            load_weights(self.sampler.model, self._take(wanted), wanted)
        self.version, self._published = wanted.version, wanted

    def read(self, folder: Path, published: PolicyWeights | None) -> None:
        """Load the model from a component folder, for an evaluation.

        With `published`, verify that the folder holds that version.
        """
        if folder == self._evaluated:
            return
        self.sampler.load(folder)
        self._evaluated = folder
        if published is not None:
            verify_weights(self.sampler.model, published)

    def _holds_start_weights(self) -> bool:
        """Whether the model still holds the weights this actor started with, not yet verified against the learner's."""
        return self._evaluated is None and self._published is None

    def _take(self, wanted: PolicyWeights) -> Arrays:
        """Arrays of a version: prefetched if they match, otherwise fetched now (a restarted actor has none)."""
        with self._lock:
            arrived, self._arrived = self._arrived, None
        if arrived is not None and arrived[0] == wanted:
            return arrived[1]
        return fetch_weights(wanted, self._deadline_s)
