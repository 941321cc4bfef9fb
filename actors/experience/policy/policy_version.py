"""Tracks which weights a rollout actor's policy holds, and replaces them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.experience.policy.canary import check_canary, known_kernels, take_canary
from actors.experience.policy.policy_sampler import PolicySampler
from actors.experience.policy.weight_sync import (
    check_transport,
    fetch_weights,
    load_weights,
    policy_checksum,
    verify_weights,
)
from actors.messages import Arrays, PolicyWeights
from deepgen.config import Settings


@dataclass(frozen=True)
class _Folder:
    """Weights of a component folder, checked against a published version if there was one."""

    path: Path
    published: PolicyWeights | None = None


class LoadedPolicy:
    """A policy sampler together with the version of its weights.

    `prefetch` may run in a different thread from the other methods. It only fetches weights into this process; `use`
    copies them into the model before the next group. A group is therefore never sampled with a mixture of two versions.

    Weights count as held when all of them are in the model and its checksum and canary are the learner's. Until then
    the model holds nothing: a load that stopped in the middle is made again from the beginning.
    """

    def __init__(self, settings: Settings) -> None:
        check_transport(settings.experience.transport)
        self.sampler = PolicySampler(settings)
        self._rollout, self._deadline_s = settings.rollout, settings.experience.deadline_s
        self._start = _Folder(settings.model.weights)
        self._holds: PolicyWeights | _Folder | None = self._start
        self._changing = threading.Lock()  # held while the model is replaced or checked
        self._lock = threading.Lock()  # guards _arrived
        self._arrived: tuple[PolicyWeights, Arrays] | None = None  # fetched but not loaded yet
        self._start_checksum = ""  # of the weights folder's, once somebody has asked

    def prefetch(self, published: PolicyWeights) -> None:
        """Fetch a version into this process.

        If the actor already holds that version from its weights folder, the weights are only checked: the learner read
        the same folder, so there is nothing to fetch.
        """
        with self._changing:
            if self._holds == self._start and published.version == 0:
                self._check(published)
                return
        arrays = fetch_weights(published, self._deadline_s)
        with self._lock:
            self._arrived = (published, arrays)

    def use(self, wanted: PolicyWeights | None) -> int:
        """Make the model hold version `wanted`, and return its number; None means the weights folder, version 0.

        Raises WeightsMismatchError if the model afterwards is not the published one.
        """
        with self._changing:
            if wanted is None:
                if not self._holds_version_0():
                    self._holds = None
                    self.sampler.load(self._start.path)
                    self._holds = self._start
                return 0
            if self._holds == self._start and wanted.version == 0:
                self._check(wanted)  # same folder as the learner's: no copy
            elif self._holds != wanted:
                arrays = self._take(wanted)
                self._holds = None
                load_weights(self.sampler.trained_parameters(), arrays, wanted)
                self._check(wanted)
            return wanted.version

    def checksum(self) -> str:
        """Of the weights that `use` has loaded. The weights folder has that of version 0, which it is."""
        with self._changing:
            if isinstance(self._holds, PolicyWeights):
                return self._holds.checksum
            if not self._start_checksum:
                self._start_checksum = policy_checksum(0, self.sampler.trained_parameters().items())
            return self._start_checksum

    def kernels(self) -> str:
        """Name of what rounds this process's sums, or at least of the accelerator."""
        device = self.sampler.model.transformer.device
        return known_kernels(device) or torch.cuda.get_device_name(device)

    def read(self, folder: Path, published: PolicyWeights | None) -> None:
        """Load the model from a component folder, for an evaluation.

        With `published`, check that the folder holds that version.
        """
        wanted = _Folder(folder, published)
        with self._changing:
            if self._holds == wanted:
                return
            self._holds = None
            self.sampler.load(folder)
            if published is not None:
                self._check(published)
            self._holds = wanted

    def _check(self, published: PolicyWeights) -> None:
        """Compare the model with the published version, which it holds from then on."""
        self._holds = None
        verify_weights(self.sampler.trained_parameters(), published)
        check_canary(take_canary(self.sampler.model, self._rollout), published.canary, published.version)
        self._holds = published

    def _holds_version_0(self) -> bool:
        return self._holds == self._start or (isinstance(self._holds, PolicyWeights) and self._holds.version == 0)

    def _take(self, wanted: PolicyWeights) -> Arrays:
        """Arrays of a version: prefetched if they match, otherwise fetched now (a restarted actor has none)."""
        with self._lock:
            arrived, self._arrived = self._arrived, None
        if arrived is not None and arrived[0] == wanted:
            return arrived[1]
        return fetch_weights(wanted, self._deadline_s)
