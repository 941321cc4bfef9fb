"""How long the parts of an rl step take, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

GIVEN, MEASURED, ESTIMATED, ASSUMED = "given", "measured", "estimated", "assumed"

MEANINGS = {
    "sample_s": "a rollout actor draws one group",
    "load_s": "a rollout actor loads a new version before its first group of it",
    "score_s": "one call of a reward's replica: per call + per image",
    "update_s": "forward and backward of one group on one learner rank",
    "step_s": "the rest of an update: other losses, all-reduce, optimizer",
    "publish_s": "the learner copies new weights before it goes on",
    "sync_s": "from then until groups may be drawn with them",
    "checkpoint_s": "the learner copies a checkpoint before it goes on",
    "write_s": "a checkpoint is on disk, behind the next steps",
    "restart_s": "a learner starts again from a checkpoint after a node's death",
    "revive_s": "a rollout actor or reward replica starts again",
    "control_s": "the stream's process works on one group",
}


@dataclass(frozen=True)
class CallTime:
    """Seconds of one call of a reward's replica: `call_s`, and `image_s` for each image in it."""

    call_s: float
    image_s: float

    def of(self, images: float) -> float:
        """Seconds of a call with so many images."""
        return self.call_s + self.image_s * images


@dataclass(frozen=True)
class Phases:
    """Seconds, with the meanings in MEANINGS. score_s: by the name of the reward's pool."""

    sample_s: float
    load_s: float
    score_s: Mapping[str, CallTime]
    update_s: float
    step_s: float
    publish_s: float
    sync_s: float
    checkpoint_s: float
    write_s: float
    restart_s: float
    revive_s: float
    control_s: float


NUMBERS = tuple(field.name for field in fields(Phases) if field.name != "score_s")


@dataclass(frozen=True)
class Figure:
    """A number, its source (GIVEN, ...), and what it rests on, if a reader needs to know."""

    value: float
    source: str
    why: str = ""


@dataclass(frozen=True)
class ScoreFigure:
    """The same of a reward's calls."""

    value: CallTime
    source: str
    why: str = ""


@dataclass(frozen=True)
class PhaseFigures:
    """The phases with their sources. numbers: of all but score_s, by name. scores: of score_s, by pool."""

    numbers: Mapping[str, Figure]
    scores: Mapping[str, ScoreFigure]

    def replaced(self, numbers: Mapping[str, Figure], scores: Mapping[str, ScoreFigure]) -> PhaseFigures:
        """These, with some of them replaced."""
        return PhaseFigures({**self.numbers, **numbers}, {**self.scores, **scores})

    def phases(self) -> Phases:
        """The numbers alone."""
        scores = {name: figure.value for name, figure in self.scores.items()}
        return Phases(score_s=scores, **{name: self.numbers[name].value for name in NUMBERS})
