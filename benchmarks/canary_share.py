"""What the canary adds to the sync of one policy version to one rollout actor, the learner's part included.

Ours: the canary, scored once by each side. Floor: all else, one after the other in this process: the learner's copy,
the checksum, the way into the object store and out of it, the copy into the model, the checksum again. Left out: the
calls to stream and actors.
"""

from __future__ import annotations

from pathlib import Path

from actors.experience.policy.canary import take_canary
from actors.experience.policy.weight_sync import fetch_weights, load_weights, publish_weights, verify_weights
from benchmarks.timing import Result, compare, recipe
from deepgen.cluster.private import start_private
from deepgen.config.settings import RolloutSettings
from deepgen.models.unified import UnifiedModel

DEADLINE_S = 60.0


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """One result: seconds a version."""
    learner, actor = (UnifiedModel.from_folder(weights).requires_grad_(False) for _ in range(2))
    return [measure("canary of a sync", learner, actor, recipe("tiny-rl", weights).rollout, repeats)]


def measure(name: str, learner: UnifiedModel, actor: UnifiedModel, rollout: RolloutSettings, repeats: int) -> Result:
    """The canary of both against the rest of a sync. They may be one model."""
    import ray

    sent, held = dict(learner.trainable_parameters("rl")), dict(actor.named_parameters())
    trained = {name: held[name] for name in sent}
    canary = take_canary(learner, rollout)

    def both() -> None:
        for model in (learner, actor):
            take_canary(model, rollout)

    def sync() -> None:
        copies = {name: parameter.detach().float().to("cpu", copy=True) for name, parameter in sent.items()}
        published = publish_weights(1, copies, canary)
        load_weights(trained, fetch_weights(published, DEADLINE_S), published)
        verify_weights(trained, published)

    start_private(1, log_to_driver=False)
    try:
        size = sum(parameter.numel() for parameter in trained.values()) / 1e6
        return compare(name, f"{size:.1f} M parameters", 1, both, sync, repeats)
    finally:
        ray.shutdown()
