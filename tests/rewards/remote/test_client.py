"""The reward `remote` against a scorer that fails in every way: the right reason in time, and no value invented."""

from __future__ import annotations

import json
import logging
import pickle
import re
import socket
import time
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from deepgen.config import load_settings
from deepgen.config.schema.pools import make_pool
from deepgen.config.settings import shown_settings
from deepgen.errors import UserError
from rewards import Missing, RewardRequest, RewardUnavailable, Score, build_reward
from rewards.remote import caller
from rewards.remote.client import RemoteReward
from rewards.remote.protocol import read_question, write_answer
from tests.helpers.fault_server import FAULTS, fault_server
from tests.helpers.servers import redirect, reply, server

DEADLINE_S, SLACK_S, PLENTY_S = 0.4, 10.0, 40.0  # slack: the machine may be busy
TRICKLE = {"pause_s": 0.5, "late_s": 40.0}  # far longer than deadline and slack
WANTED = {
    "refuse": RewardUnavailable,
    "hang": "deadline",
    "500": RewardUnavailable,
    "429": RewardUnavailable,
    "half": RewardUnavailable,
    "wrong_json": "parse",
    "nan": "parse",
    "10mb": "parse",
    "wrong_count": "parse",
    "trickle": "deadline",
    "trickle_head": "deadline",
    "late": "deadline",
}


def brightness(path: str, body: bytes) -> Any:
    """The answer of a scorer that likes light images."""
    scores: list[Score] = [
        one if isinstance(one, Missing) else float(one.image.mean()) / 255 for one in read_question(body)
    ]
    return json.loads(write_answer(scores))


def remote(url: str, **options: Any) -> RemoteReward:
    reward = build_reward(make_pool("far", {"class": "remote", "url": url, "timeout_s": PLENTY_S, **options}))
    assert isinstance(reward, RemoteReward)
    return reward


def grey(*levels: int) -> list[RewardRequest]:
    return [RewardRequest("a cat", "", "t2i", np.full((8, 8, 3), level, np.uint8)) for level in levels]


def reasons(scores: Sequence[Score]) -> list[Any]:
    return [one.reason if isinstance(one, Missing) else one for one in scores]


def test_every_fault_is_expected() -> None:
    assert set(WANTED) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_its_reason_in_time_and_the_next_call_is_right(fault: str) -> None:
    with fault_server(brightness, script=[fault], retry_after="0", **TRICKLE) as scorer:
        wanted = WANTED[fault]
        reward = remote(scorer.url, timeout_s=DEADLINE_S if wanted == "deadline" else PLENTY_S)
        began = time.monotonic()
        if wanted is RewardUnavailable:
            with pytest.raises(RewardUnavailable, match=scorer.url):
                reward.score(grey(0, 51, 255))
        else:
            assert reasons(reward.score(grey(0, 51, 255))) == [wanted] * 3
        assert time.monotonic() - began < DEADLINE_S + SLACK_S
        reward._timeout_s = PLENTY_S
        assert reward.score(grey(0, 51, 255)) == pytest.approx([0, 0.2, 1])
        assert scorer.fates == {fault: 1, "": 1}


def test_a_fault_in_one_score_costs_only_this_one() -> None:
    def first_is_nan(path: str, body: bytes) -> Any:
        answer = brightness(path, body)
        answer["scores"][0]["score"] = float("nan")
        return answer

    with fault_server(first_is_nan) as scorer:
        assert reasons(remote(scorer.url).score(grey(255, 51))) == ["parse", pytest.approx(0.2)]


def test_a_second_answer_is_not_that_of_the_next_call() -> None:
    with fault_server(brightness, script=["twice"] * 3) as scorer:
        reward = remote(scorer.url)
        assert [reward.score(grey(level)) for level in (51, 0, 255)] == [[pytest.approx(0.2)], [0.0], [1.0]]
        assert [head["Connection"] for head in scorer.heads] == ["close"] * 3


def test_under_random_faults_no_score_is_wrong() -> None:
    quick = [fault for fault in FAULTS if WANTED[fault] != "deadline"]
    with fault_server(brightness, rate=0.5, seed=7, faults=[*quick, "late"], retry_after="0", late_s=0.6) as scorer:
        reward, right, fates = remote(scorer.url, timeout_s=0.3), 0, 0
        for level in range(60):
            try:
                (score,) = reward.score(grey(level))
            except RewardUnavailable:
                continue
            fates += 1
            if not isinstance(score, Missing):
                assert score == pytest.approx(level / 255)
                right += 1
        assert 15 < right <= scorer.fates[""] and right < fates


def test_a_closed_port_and_an_unknown_host_are_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/x", "http://no-such-host.invalid/x"):
        with pytest.raises(RewardUnavailable, match="cannot be reached"):
            remote(url, timeout_s=5.0).score(grey(0))


def test_a_service_that_wants_a_pause_gets_it() -> None:
    with fault_server(brightness, script=["429"], retry_after="9999") as scorer:
        reward = remote(scorer.url)
        for said in ("status 429: slow down", "asked again in", "asked again in"):
            with pytest.raises(RewardUnavailable, match=said):
                reward.score(grey(0))
        assert scorer.fates == {"429": 1}  # only the first call reached it
    with fault_server(brightness, script=["429"], retry_after="1") as scorer:
        reward = remote(scorer.url)
        with pytest.raises(RewardUnavailable):
            reward.score(grey(0))
        began = time.monotonic()
        assert reward.score(grey(255)) == [1.0]
        assert time.monotonic() - began > 0.8


def test_a_pause_ends_with_the_deadline() -> None:
    with fault_server(brightness, script=["429"], retry_after="9999") as scorer:
        reward = remote(scorer.url, timeout_s=0.4, deadline_s=0.5)
        with pytest.raises(RewardUnavailable) as raised:
            reward.score(grey(0))
        assert raised.value.after_s == 0.5
        time.sleep(0.5)
        reward._timeout_s = PLENTY_S
        assert reward.score(grey(255)) == [1.0]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("3", 3), ("0", 0), ("99999999999999", 60), ("soon", 0), ("-1", 0), ("", 0), ("²", 0)],
)
def test_retry_after(given: str, seconds: float) -> None:
    assert caller._retry_after_s(given) == seconds


def test_retry_after_as_a_date() -> None:
    assert caller._retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert caller._retry_after_s("Wed, 21 Oct 2115 07:28:00 GMT") == 60
    assert caller._retry_after_s("Wed, 99999999999999999999 Oct 2115 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    ("status", "reason"), [("401 Unauthorized", "refused"), ("404 Not Found", "refused"), ("413 Too Large", "too_long")]
)
def test_a_refusal_is_told(status: str, reason: str) -> None:
    with server({"/": reply(b"no token\x1b[2J\nsecret=abcdef", status)}) as port:
        (missing,) = remote(f"http://127.0.0.1:{port}/clip?key=hidden").score(grey(0))
    assert isinstance(missing, Missing) and missing.reason == reason
    assert missing.detail == f"http://127.0.0.1:{port}/clip answers with status {status[:3]}: no token [2J secret=***"


def test_redirects_are_not_followed() -> None:
    heads: list[str] = []
    with (
        server({"/": reply(b"{}")}, heads) as elsewhere,
        server({"/": redirect(f"http://127.0.0.1:{elsewhere}/", "307 Temporary Redirect")}) as port,
    ):
        (missing,) = remote(f"http://127.0.0.1:{port}/").score(grey(0))
    assert isinstance(missing, Missing) and missing.reason == "refused" and "redirects" in missing.detail
    assert heads == []


def test_packed_answers_are_not_unpacked() -> None:
    with server({"/": reply(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip")}) as port:
        assert reasons(remote(f"http://127.0.0.1:{port}/").score(grey(0))) == ["parse"]


def test_the_token_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FAR_TOKEN", "t0p-s3cret-words")
    caplog.set_level(logging.DEBUG)
    with fault_server(brightness, script=["", "500"]) as scorer:
        reward = remote(scorer.url + "/?password=hidden-too", token_env="FAR_TOKEN")
        assert reward.score(grey(255)) == [1.0]
        with pytest.raises(RewardUnavailable) as raised:
            reward.score(grey(255))
        assert scorer.heads[0]["Authorization"] == "Bearer t0p-s3cret-words"
        url = f"rewards.remote.url={scorer.url}/?password=hidden-too"
    settings = load_settings(None, [url, "rewards.remote.token_env=FAR_TOKEN"])
    shown = str(shown_settings(settings)["rewards"]["remote"])
    for text in (caplog.text, str(raised.value), shown):
        assert "t0p-s3cret" not in text and "hidden-too" not in text
    assert "FAR_TOKEN" in shown


def test_large_requests_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    long = RewardRequest("a" * 30_000, "", "t2i", grey(0)[0].image)
    with fault_server(brightness) as scorer:
        reward = remote(scorer.url)
        assert reasons(reward.score([long, *grey(255), long])) == ["too_long", 1.0, "too_long"]
        assert reasons(reward.score([long])) == ["too_long"]
        assert reward.score([]) == []
        assert scorer.fates == {"": 1}
        monkeypatch.setattr("rewards.remote.protocol.MAX_REQUESTS", 2)
        assert reward.score(grey(0, 51, 102, 255)) == pytest.approx([0, 0.2, 0.4, 1])
        assert scorer.fates == {"": 3}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": ""}, "rewards.far.url: got ''; allowed: http://HOST:PORT/PATH"),
        ({"url": "ftp://host/x"}, "rewards.far.url: got 'ftp://host/x'"),
        ({"url": "http://user:secret@host/"}, "rewards.far.url: holds a user or password"),
        ({"url": "http://host:99999/"}, "rewards.far.url"),
        ({"url": "http://[::1/"}, "rewards.far.url"),
        ({"url": "http://xn--/"}, "rewards.far.url: got 'http://xn--/', which is no address"),
        ({"token_env": "NOT_SET_HERE"}, "rewards.far.token_env: the environment variable 'NOT_SET_HERE' is not set"),
        ({"token_env": "ODD_TOKEN"}, "rewards.far.token_env: the token in 'ODD_TOKEN' has letters"),
        ({"timeout_s": 120.0}, "rewards.far.timeout_s: got 120 with a deadline_s of 120"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_TOKEN", "secret\r\nX-Other: 1")
    with pytest.raises(UserError) as raised:
        remote(**{"url": "http://127.0.0.1:1/", **options})
    assert says in str(raised.value) and "secret" not in str(raised.value)


def test_the_scorer_of_the_docs_page_is_one(root: Path) -> None:
    page = (root / "docs" / "remote-rewards.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    assert code.rstrip().endswith('ThreadingHTTPServer(("127.0.0.1", 8802), Scorer).serve_forever()')
    scope: dict[str, Any] = {}
    exec(code[: code.index("ThreadingHTTPServer((")], scope)
    scope["Scorer"].log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), scope["Scorer"]) as scorer:
        Thread(target=scorer.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        scores = remote(f"http://127.0.0.1:{scorer.server_address[1]}/").score(grey(0, 51, 255))
        scorer.shutdown()
    assert scores == pytest.approx([0, 0.2, 1])


def test_settings_with_a_remote_reward_travel() -> None:
    pool = make_pool("far", {"class": "remote", "url": "http://127.0.0.1:1/"})
    assert pickle.loads(pickle.dumps(pool)) == pool
