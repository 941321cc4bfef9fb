"""What a reward is asked before the first step: a request like those of the run, so that errors come now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
from ray.exceptions import RayError, RayTaskError

from actors.experience.scoring.pool_parts import first_line
from actors.experience.scoring.replica import CallTimeout, FirstCallTimeout, Replica
from actors.gone import GONE
from deepgen.config import PoolSettings
from deepgen.errors import UserError
from rewards import Missing, RewardRequest, applies, is_groupwise

log = logging.getLogger(__name__)

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


async def first_score(
    replica: Replica,
    start: Callable[[float], Awaitable[Missing | None]],
    settings: PoolSettings,
    pause_s: Callable[[int], float],
    deadline_s: float,
) -> None:
    """Have a replica score its first request. Raises UserError if its reward cannot.

    A service that is down or busy, and a reward that hangs, get as many attempts as in the run. A process that hangs is
    replaced, as in the run.

    start: loads the reward and has it score, until a time of the event loop's clock; returns why there is no score.
    pause_s: before an attempt. deadline_s: for all attempts together.

    Raises CallTimeout if the reward has never been loaded.
    """
    clock, missing, left = asyncio.get_running_loop().time, None, settings.retries
    end = clock() + deadline_s
    try:
        while True:
            hangs = False
            try:
                missing = await start(end)
            except FirstCallTimeout as late:
                missing, hangs = Missing("deadline", str(late)), True
            except CallTimeout:  # a new process has not loaded it in the time that is left
                if missing is None:
                    raise
            if missing is None or missing.reason not in ("transport", "deadline") or not left:
                break
            if clock() >= end:
                missing = replace(missing, detail=f"{missing.detail}; cluster.start_deadline_s is over")
                break
            left -= 1
            log.warning("rewards.%s: a first request has no score yet: %s", settings.pool_name, missing.detail)
            if hangs:
                replica.replace()
            await asyncio.sleep(pause_s(settings.retries - left))
    except GONE:
        raise
    except RayError as error:
        met = error.cause if isinstance(error, RayTaskError) else error  # one that cannot be pickled has no cause
        cause = f"{type(met).__name__}: {first_line(met)}"
        trace = f"{replica.label} could not score a first request:\n{error}"
        raise UserError(unfit(settings, cause, "see the traceback above, and its options"), trace) from error
    if missing is None:
        return
    if remedy := remedy_for(missing):
        raise UserError(unfit(settings, missing.detail, remedy, missing.options))
    name, reason = settings.pool_name, missing.reason
    log.warning("rewards.%s: the first request has no score (%s: %s)", name, reason, missing.detail)


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
