"""What a reward is: a plain class that turns requests into scores.

A reward knows nothing of Ray, pools, retries or caches; `RewardPool` adds those. It is built in the process
that runs it, so its heavy imports belong into its constructor, and the module itself stays light enough for the
process that only routes requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from deepgen.errors import UserError


@dataclass(frozen=True, eq=False)
class RewardRequest:
    """One image to score.

    Attributes:
        prompt: what the user typed: caption, riddle or edit instruction.
        answer: plain description of what the image should show; empty means that the prompt says it.
        task: one of `deepgen.config.settings.TASKS`.
        image: uint8 [H, W, 3], RGB.
        references: source images of an edit, uint8 [H, W, 3] each; empty for generation.
    """

    prompt: str
    answer: str
    task: str
    image: np.ndarray
    references: tuple[np.ndarray, ...] = ()

    @property
    def target(self) -> str:
        """What the image should show, in words."""
        return self.answer or self.prompt


class RewardUnavailable(Exception):
    """Raised by a reward whose scores can't be had just now (a service that does not answer, for example).

    The pool tries again and in the end reports the scores as missing. Every other exception of a reward is a bug and
    ends the run.
    """


class Reward(Protocol):
    """One scorer. Calls are not concurrent: a replica scores one batch at a time."""

    name: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build the reward from its settings (`rewards.<name>`); bad ones raise `UserError`."""
        ...

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        """Whether this reward can say anything about the request. The pool never sends those it can't."""
        ...

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score a request, in order; higher is better; None = could not be had (never 0 instead)."""
        ...


def existing_folder(reward: str, path: str | Path, *files: str) -> Path:
    """The folder at `path`, checked to hold `files`.

    Raises:
        UserError: the folder or one of the files is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"rewards.{reward}.path: no such folder: {str(folder.absolute())!r}")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"rewards.{reward}.path: {str(folder.absolute())!r} holds no {file}")
    return folder
