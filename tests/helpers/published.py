"""Policy versions as the learner publishes them."""

from __future__ import annotations

from actors.experience.policy.canary import take_canary
from actors.experience.policy.weight_sync import publish_weights
from actors.messages import OBJECT_STORE, PolicyWeights
from deepgen.config import Settings
from deepgen.models.unified import UnifiedModel


def publish(settings: Settings, version: int, scale: float = 1.0, transport: str = OBJECT_STORE) -> PolicyWeights:
    """The model in the weights folder, with its trained weights scaled, as a version."""
    model = UnifiedModel.from_folder(settings.model.weights)
    weights = {name: parameter.detach().mul_(scale) for name, parameter in model.trainable_parameters("rl")}
    return publish_weights(version, weights, take_canary(model, settings.rollout), transport)


class SendingLearner:
    """A process that publishes, as the learner's rank 0 does."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def publish(self, version: int, scale: float, transport: str) -> PolicyWeights:
        return publish(self._settings, version, scale, transport)
