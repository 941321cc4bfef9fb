"""Which weights the policy of a rollout actor holds, and how it comes to hold others."""

from __future__ import annotations

import threading
from pathlib import Path

from actors.experience.policy_sampler import PolicySampler
from actors.experience.weight_sync import fetch_weights, load_weights, verify_weights
from actors.messages import Arrays, PolicyWeights
from deepgen.config import Settings


class LoadedPolicy:
    """The policy's sampler and the version of the weights in it.

    `prefetch` may run in another thread than the other methods: it only brings weights into this process, and `use`
    copies them into the model when the next group wants them. So no group is sampled with half of two versions.
    """

    def __init__(self, settings: Settings) -> None:
        self.sampler = PolicySampler(settings)
        self.version = 0  # what the weights folder holds
        self._start_folder, self._deadline_s = settings.model.weights, settings.experience.deadline_s
        self._published: PolicyWeights | None = None  # what the model was made to hold, or was compared with
        self._evaluated: Path | None = None  # the folder in the model's weights, if the last call was an evaluation's
        self._lock = threading.Lock()  # guards _arrived
        self._arrived: tuple[PolicyWeights, Arrays] | None = None  # fetched, not loaded

    def prefetch(self, published: PolicyWeights) -> None:
        """Bring a version to this process.

        The version that this actor started with is checked instead: the learner has read the same folder.
        """
        if self._holds_start_weights() and published.version == self.version:
            verify_weights(self.sampler.model, published)
            self._published = published
            return
        arrays = fetch_weights(published, self._deadline_s)
        with self._lock:
            self._arrived = (published, arrays)

    def use(self, wanted: PolicyWeights | None) -> None:
        """Make the model hold the wanted version; None is the folder that the run started from.

        Raises WeightsMismatchError when what is in the model afterwards is not what the learner published.
        """
        unchecked_start = self._holds_start_weights()
        # An evaluation leaves a folder's weights behind. `version` does not tell, so they are replaced in any case.
        intact, self._evaluated = self._evaluated is None, None
        if intact and (wanted == self._published or (wanted is None and self.version == 0)):
            return
        if wanted is None:
            self.sampler.load(self._start_folder)
            self.version, self._published = 0, None
            return
        if unchecked_start and wanted.version == self.version:
            verify_weights(self.sampler.model, wanted)  # the learner read the same folder: nothing to copy
        else:
            load_weights(self.sampler.model, self._take(wanted), wanted)
        self.version, self._published = wanted.version, wanted

    def read(self, folder: Path, published: PolicyWeights | None) -> None:
        """Make the model hold what lies in a component folder; `published`: and check that it is this version."""
        if folder == self._evaluated:
            return
        self.sampler.load(folder)
        self._evaluated = folder
        if published is not None:
            verify_weights(self.sampler.model, published)

    def _holds_start_weights(self) -> bool:
        """Whether the model is as it was read when this actor started, and never compared with the learner's."""
        return self._evaluated is None and self._published is None

    def _take(self, wanted: PolicyWeights) -> Arrays:
        """The arrays of a version: the prefetched ones, or fetched now (a restarted actor has none)."""
        with self._lock:
            arrived, self._arrived = self._arrived, None
        if arrived is not None and arrived[0] == wanted:
            return arrived[1]
        return fetch_weights(wanted, self._deadline_s)
