"""The interface of a reward: a plain class that turns requests into scores.

A reward knows nothing about Ray, retries or caches; `RewardPool` adds those. Every process that reads the settings
imports the reward's module to learn its options, but only the replicas build the reward. So put heavy imports in its
constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        answer: plain description of what the image should show; if empty, the prompt describes it.
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


@dataclass(frozen=True)
class TextLimit:
    """How much text a model reads.

    Attributes:
        folder: folder of its tokenizer (tokenizer.json).
        tokens: length of the longest text that it reads as a whole.
        beyond: what happens to a longer one, after "is too long for ...: it".
        asked: the model's whole input for a text.
    """

    folder: Path
    tokens: int
    beyond: str
    asked: Callable[[str], str] = str


# Why a score is missing; metrics count each.
REASONS = (
    "deadline",  # no answer in time
    "transport",  # a service that cannot be reached, breaks off, or answers with an error
    "parse",  # an answer that holds no score, or none that is finite
    "refused",  # the reward cannot be asked this, or the service refuses it
    "too_long",  # more text, or a larger image, than the reward reads
    "died",  # the process that scored
)


@dataclass(frozen=True)
class Missing:
    """In place of a score: why there is none.

    Attributes:
        reason: one of REASONS.
        detail: one line for the log, without secrets.
        options: options of the reward that have to change before any request gets a score, for example the one with the
            token that a service refuses. Found before the first step, it ends the run with a line that names them.
    """

    reason: str
    detail: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"reason {self.reason!r}; allowed: {', '.join(REASONS)}")


def strip_fault(image: np.ndarray, most: int) -> Missing | None:
    """Why a reward cannot be asked about an image, uint8 [H, W, 3], whose sides have a ratio above `most`."""
    height, width = image.shape[:2]
    if max(height, width) <= most * min(height, width):
        return None
    return Missing("refused", f"an image of {width} x {height}; allowed: sides in a ratio up to {most}")


Score = float | Missing | None  # higher is better; None: missing, and the reward does not say why


def is_truth(score: object) -> bool:
    """Whether a score is True or False, Python's, numpy's or torch's: most likely a comparison, by mistake."""
    return isinstance(score, bool) or str(getattr(score, "dtype", "")).endswith("bool")


class RewardUnavailable(Exception):
    """Raised by a reward that cannot score right now, for example because a service does not answer.

    The pool retries and finally reports the scores as missing. After any other exception it looks for the request that
    causes it, whose score is missing; if several prompts in a row do, it is a bug and ends the run.

    after_s: how long a service wants to be left alone; until then, at most `deadline_s`, the pool asks for nothing.
    """

    after_s = 0.0

    def __init__(self, *arguments: object, after_s: float = 0.0) -> None:
        super().__init__(*arguments)
        self.after_s = after_s


class RewardBroken(Exception):
    """Raised by a reward whose process can score nothing any more, for example because its engine has failed.

    The pool puts a new process in its place, and there tries the requests in halves, as one of them may have done it.
    """


class Reward(Protocol):
    """One scorer. Calls are not concurrent: a replica scores one batch at a time.

    A reward that compares the images of a prompt with each other defines `score_groups(groups)` in the place of
    `score`: it gets lists of requests, each all images of one prompt (may be a single one), and returns a list of
    scores for each.

    A reward class may define three more members:

    `Options`, a subclass of `deepgen.config.PoolSettings`, declares the reward's options. The constructor then takes
    one argument, the pool's settings as an `Options` object, and raises `UserError` for values it cannot use. Without
    `Options` the constructor takes no arguments.

    `applies(request) -> bool`, a static method, tells whether the reward can score a request. The pool skips requests
    for which it returns False. Without `applies` the pool sends every request.

    `text_limit(options) -> TextLimit | None`, a static method, says how much of a request's target the reward's model
    reads. The start of a run then says how many prompts are longer.

    A reward whose scores are not decided by its options, its files and our code, because a service gives them, has an
    attribute `version`, a text that is read after each call: what the service calls itself, "" while that is unknown.
    Scores of one version are never taken for those of another.
    """

    def score(self, requests: Sequence[RewardRequest]) -> Sequence[Score]:
        """One score per request, in order; higher is better; None or a `Missing` = missing (never 0 instead)."""
        ...


def existing_folder(key: str, path: str | Path, *files: str) -> Path:
    """The folder at `path`, after checking that it holds `files`.

    Raises:
        UserError: the folder or one of the files is missing; the message names `key`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {str(folder.absolute())!r}")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{key}: {str(folder.absolute())!r} holds no {file}")
    return folder
