"""A process that publishes weights, as the learner's rank 0 does."""

from __future__ import annotations

from pathlib import Path

from actors.messages import PolicyWeights
from deepgen.config import Settings


class SendingLearner:
    """Publishes a model's weights, each version a little larger than the one before."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder

    def publish(self, version: int, transport: str) -> PolicyWeights:
        from actors.experience.policy.canary import take_canary
        from actors.experience.policy.weight_sync import publish_weights
        from deepgen.models.unified import UnifiedModel

        model = UnifiedModel.from_folder(self._folder)
        weights = {n: p.detach().mul_(1 + version / 100) for n, p in model.trainable_parameters("rl")}
        return publish_weights(version, weights, take_canary(model, self._settings.rollout), transport)
