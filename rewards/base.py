"""What a reward is: a plain class that turns requests into scores.

A reward knows nothing of Ray, retries or caches; `RewardPool` adds those. Every process that reads the settings imports
its module, for the options it declares; only its replicas build it. So heavy imports belong into its constructor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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
    """One scorer. Calls are not concurrent: a replica scores one batch at a time.

    A class may have two more things. `Options`, a subclass of `deepgen.config.PoolSettings`, declares its options; the
    constructor then gets the pool's settings, of that class, as its only argument (without `Options` it gets none), and
    raises `UserError` for those it can't work with. `applies(request) -> bool`, a static method, says whether the
    reward can say anything about a request; the pool never sends those it can't. Without it all are sent.
    """

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score a request, in order; higher is better; None = could not be had (never 0 instead)."""
        ...


def existing_folder(key: str, path: str | Path, *files: str) -> Path:
    """The folder at `path`, checked to hold `files`.

    Raises:
        UserError: the folder or one of the files is missing; it names `key`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {str(folder.absolute())!r}")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{key}: {str(folder.absolute())!r} holds no {file}")
    return folder
