"""What a reward is asked before the first step: a request like those of the run, so that errors come now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgen.config import PoolSettings
from rewards import Missing, RewardRequest, applies, is_groupwise

_SIDE = 64
# For each task what a user might type, and what the picture should show.
_PROMPTS = {
    "t2i": ('a sign with the word "ok"', ""),
    "reasoning": ("what tells drivers to stop", 'a sign with the word "stop"'),
    "text": ('a sign with the word "ok"', ""),
    "edit": ('write the word "ok" on the sign', 'a sign with the word "ok"'),
}


def check_requests(settings: PoolSettings, tasks: Sequence[str]) -> list[RewardRequest]:
    """One request of the first of these tasks to which the reward applies; two where it compares; [] if none does."""
    for task in tasks:
        prompt, answer = _PROMPTS.get(task, _PROMPTS["t2i"])
        references = (_picture(0),) if task == "edit" else ()
        requests = [RewardRequest(prompt, answer, task, _picture(number), references) for number in (1, 2)]
        if applies(settings, requests[0]):
            return requests if is_groupwise(settings) else requests[:1]
    return []


def remedy_for(missing: Missing) -> str:
    """What to do where a reward has no score for any request, whatever is asked; "" where another may have one."""
    if missing.options:
        return "set"
    return "see to what it asks for scores, and its options" if missing.reason in ("transport", "deadline") else ""


def unfit(settings: PoolSettings, why: str, remedy: str, options: Sequence[str] = ("*",)) -> str:
    """The line that ends a start: the reward, what happened, and which of its options to look at."""
    keys = " or ".join(settings.dotted(option) for option in options or ("*",))
    first = f"rewards.{settings.pool_name}: the reward cannot score a first request"
    return f"{first}: {why}; {remedy} {keys}, or give it no weight"


def _picture(number: int) -> np.ndarray:
    """A grey ramp with a bright sign on it, uint8 [64, 64, 3]."""
    picture = np.repeat(np.linspace(32, 192, _SIDE, dtype=np.uint8)[None], _SIDE, axis=0)[..., None].repeat(3, axis=2)
    picture[16 : 32 + 4 * number, 16:48] = (250, 240, 230)
    return picture
