"""The status of a run in the middle of its life, at Unix time 1000."""

from __future__ import annotations

from deepgen.tracking.status import Call, GroupsOfStep, Rank, Status

STATUS = Status(
    time=1000.0,
    ended=False,
    steps=60,
    version=2,
    actors={"rollout": 2, "clip": 1, "judge": 1},
    calls=(Call("rollout-1", "sample_group of group 7", 690.0), Call("clip reward #0", "score of 4 images", 700.0)),
    under_way=(GroupsOfStep(2, 4, 4, 4), GroupsOfStep(3, 4, 2, 1)),
    learner=(Rank(0, 3, True, 695.0), Rank(1, 2, False, 500.0)),
    open_requests={"clip": 12, "judge": 0},
    missing={"clip": 3, "judge": 0},
    restarts={"rollout": 1, "clip": 0, "judge": 0},
)
