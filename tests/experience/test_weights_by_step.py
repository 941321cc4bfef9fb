"""A group's reward weights follow from its step; an evaluation has those after all warm-ups."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from actors.experience.rollout_actor import RolloutActor
from actors.messages import EvaluationRequest, Group
from deepgen.config import load_settings
from deepgen.data.records import Record
from deepgen.drawing.request import DrawRequest

WEIGHTS = (
    "rewards.weights.t2i={aesthetic: 1, clip: [0, 2, 4]}",
    "rewards.weights.source:cats={aesthetic: [1, 0.5, 4]}",
)
DOG = Record("dog", "t2i", "a dog", "", None, (), "dogs")
CAT = Record("cat", "t2i", "a cat", "", None, (), "cats")


def test_weights_of_a_group_and_of_an_evaluation() -> None:
    settings = load_settings(None, WEIGHTS)
    clip, aesthetic = (settings.rewards.used().index(name) for name in ("clip", "aesthetic"))
    actor, images = RolloutActor(settings, "rollout-0"), np.zeros((2, 8, 8, 3), np.uint8)
    sampler = SimpleNamespace(
        sample_group=lambda group: (images, {"trajectory/final": np.zeros((2, 4))}),
        draw=lambda drawing: [images[:1] for _ in drawing.records],
    )
    actor.__dict__["_policy"] = SimpleNamespace(use=lambda policy: 0, sampler=sampler)

    def of_step(record: Record, step: int) -> tuple[float, float]:
        drawn, _, _ = actor.sample_group(Group(9, step, 0, record), None)
        return float(drawn.reward_weights[clip]), float(drawn.reward_weights[aesthetic])

    assert [of_step(DOG, step) for step in (0, 1, 4, 5)] == [(0, 1), (0.5, 1), (2, 1), (2, 1)]
    assert [of_step(CAT, step) for step in (0, 2, 4)] == [(0, 1), (0, 0.75), (0, 0.5)]
    reply, _ = actor.evaluate(EvaluationRequest(DrawRequest.of_evaluation(settings, (DOG, CAT), 1)), None)
    assert reply.reward_weights[:, [clip, aesthetic]].tolist() == [[2, 1], [0, 0.5]]
