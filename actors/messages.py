"""Every type that travels between the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepgen.config import Settings


@dataclass(frozen=True)
class LearnerJob:
    """One run of the learner. ``build`` makes source and objective inside each worker; it is pickled by reference."""

    stage: str
    settings: Settings
    build: Callable[[Any], Any]  # WorkerContext -> Parts, see `actors.learner.protocols`
    gpus: bool
