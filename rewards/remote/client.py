"""A reward that another process computes: the client of docs/remote-rewards.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from deepgen.config import PoolSettings, setting
from deepgen.errors import UserError
from rewards.base import Missing, RewardRequest, Score


class RemoteReward:
    """What an HTTP service says, for example one of stages/serve_rewards.py (docs/remote-rewards.md).

    A service that cannot be reached, breaks off, or answers 408, 429 or 5xx is unavailable: the pool asks again. One
    that is late, or answers with something else than scores, costs the scores.
    """

    class Options(PoolSettings):
        url: str = setting("", "Address of the scorer.", allowed="http://HOST:PORT/PATH or https://HOST/PATH")
        token_env: str = setting(
            "", "Environment variable of the replica that holds a token for the scorer; empty for none."
        )
        timeout_s: float = setting(60.0, "Longest wait for the scores of one call; below deadline_s.", unit="s", gt=0)

    def __init__(self, options: Options) -> None:
        from rewards.remote.caller import Caller

        if options.timeout_s >= options.deadline_s:
            raise UserError(
                f"{options.dotted('timeout_s')}: got {options.timeout_s:g} with a deadline_s of "
                f"{options.deadline_s:g}, after which the replica is replaced; allowed: less than that"
            )
        keys = {"url_key": options.dotted("url"), "token_key": options.dotted("token_env")}
        self._timeout_s = options.timeout_s
        self._caller = Caller(options.url, options.token_env, longest_pause_s=options.deadline_s, **keys)
        self.version = ""  # of the scorer, as it was told with the last scores

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """The service's scores, or why there are none. Raises `RewardUnavailable` where asking again may help."""
        from rewards.remote.protocol import fault, questions

        end = time.monotonic() + self._timeout_s
        scores: list[Score] = [fault(request) for request in requests]
        places = iter([index for index, score in enumerate(scores) if score is None])
        sent = [request for request, score in zip(requests, scores, strict=True) if score is None]
        told = set[str]()
        for count, body in questions(sent):
            answer, scorer = self._ask(body, count, end)
            if any(isinstance(score, float) for score in answer):
                told.add(scorer)
            for index, score in zip(islice(places, count), answer, strict=True):
                scores[index] = score
        if told:
            self.version = told.pop() if len(told) == 1 else ""  # "": nobody knows which scores are whose
        return scores

    def _ask(self, body: bytes, count: int, end: float) -> tuple[Sequence[Score], str]:
        from rewards.remote.caller import NoAnswer
        from rewards.remote.protocol import answer_limit, read_answer

        try:
            answer = self._caller.post(body, within_s=end - time.monotonic(), limit=answer_limit(count))
        except NoAnswer as none:
            return [Missing(none.reason, none.detail, none.options)] * count, ""
        return read_answer(answer, count)
