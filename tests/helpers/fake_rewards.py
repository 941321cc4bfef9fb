"""A reward that misbehaves on request, for tests of the pool. Its state is in files, as replicas come and go."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

from deepgen.errors import UserError
from rewards import InputPath, Missing, PoolSettings, RewardRequest, RewardUnavailable, Score, setting

SPECIAL: dict[str, Score] = {
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e39": 1e39,  # infinite as fp32
    "long": Missing("too_long", "more than it reads"),
}


class FakeReward:
    """Scores an image by its first pixel / 255. Files in the folder `path` control how often it misbehaves.

    The prompts "hang", "die" and "unavailable" cause that mishap once for each of its files (`hang-0`, `hang-1` ...),
    and every new process dies once for each of the files `die-in-start-0` ...
    The prompt "bug" always raises; those in SPECIAL always have the score that it says.
    """

    class Options(PoolSettings):
        path: InputPath = setting("nowhere", "Folder of mishaps.")

    def __init__(self, options: Options) -> None:
        self.folder = options.path
        if not self.folder.is_dir():
            raise UserError(f"{options.dotted('path')}: no such folder: {str(self.folder)!r}")
        if self._take("die-in-start"):
            os._exit(1)

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        return "skip" not in request.prompt

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{len(requests)}\n")
        prompts = {request.prompt for request in requests}
        if "hang" in prompts and self._take("hang"):
            time.sleep(600)
        if "die" in prompts and self._take("die"):
            os._exit(1)
        if "unavailable" in prompts and self._take("unavailable"):
            raise RewardUnavailable("the service is down")
        if "bug" in prompts:
            raise ZeroDivisionError("a bug in the reward")
        return [SPECIAL.get(r.prompt, float(r.image[0, 0, 0]) / 255) for r in requests]

    def _take(self, mishap: str) -> bool:
        """Delete one of the mishap's files. Returns whether there was one."""
        files = sorted(self.folder.glob(f"{mishap}-*"))
        if files:
            files[0].unlink()
        return bool(files)
