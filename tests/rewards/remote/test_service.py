"""Rewards hosted on Ray Serve: a service and the reward `remote` together give the scores of the reward itself."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from deepgen.config import PoolSettings, UserError
from deepgen.config.schema.pools import make_pool
from deepgen.config.schema.sections import ClusterSettings
from rewards import Missing, RewardBroken, RewardRequest, Score, build_reward
from rewards.remote.protocol import questions
from stages import serve_rewards
from tests.helpers.servers import free_port

BRIGHTNESS = {"class": "examples.own_reward.brightness:Brightness", "wanted": 1.0}
FAKE = "tests.helpers.fake_rewards:FakeReward"
TOKEN = "a-token-for-this-test"
SOON = ClusterSettings(start_deadline_s=5.0)


def grey(*levels: int, prompt: str = "a cat") -> list[RewardRequest]:
    return [RewardRequest(prompt, "", "t2i", np.full((8, 8, 3), level, np.uint8)) for level in levels]


def remote(url: str, **options: Any) -> Any:
    return build_reward(make_pool("far", {"class": "remote", "url": url, "timeout_s": 60.0, **options}))


def reasons(scores: list[Score]) -> list[Any]:
    return [one.reason if isinstance(one, Missing) else one for one in scores]


def pool(name: str, **content: Any) -> PoolSettings:
    return make_pool(name, content)


@pytest.fixture(scope="module")
def services(ray_local: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    from actors.reward_service import Hosting, start_services, stop_services

    hosting = Hosting("127.0.0.1", free_port(), TOKEN, 1)
    folder = tmp_path_factory.mktemp("mishaps")
    pools = [pool("bright", **BRIGHTNESS), pool("fake", **{"class": FAKE, "path": str(folder), "batch_size": 2})]
    try:
        yield start_services(pools, hosting, ClusterSettings(start_deadline_s=120.0), gpus=False)
    finally:
        stop_services()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", TOKEN)


@pytest.mark.ray
def test_a_hosted_reward_scores_as_it_does_here(services: dict[str, str], token: None) -> None:
    far, here = remote(services["bright"], token_env="SCORER_TOKEN"), build_reward(pool("bright", **BRIGHTNESS))
    requests = grey(0, 51, 255)
    assert far.score(requests) == here.score(requests)
    assert re.fullmatch("[0-9a-f]{32}", far.version)  # what decides the scores, so that other runs may have them


@pytest.mark.ray
def test_what_a_hosted_reward_does_not_score_says_why(services: dict[str, str], token: None) -> None:
    far = remote(services["fake"], token_env="SCORER_TOKEN")
    requests = [*grey(255), *grey(255, prompt="skip"), *grey(255, prompt="nan"), *grey(255, prompt="none"), *grey(51)]
    assert reasons(far.score(requests)) == [1.0, "refused", "parse", "refused", pytest.approx(0.2)]


@pytest.mark.ray
def test_a_call_with_a_fault_costs_no_other_call(services: dict[str, str], token: None) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    prompts = ["a cat", "bug", "a dog", "a cow"] * 4

    def ask(prompt: str) -> httpx.Response:
        (_, body), *_ = questions(grey(51, 102, prompt=prompt))
        return httpx.post(services["fake"], content=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt == "bug":
            assert answer.status_code == 500 and answer.text == f"{FAKE} failed: ZeroDivisionError: a bug in the reward"
        else:
            assert [round(one["score"], 3) for one in answer.json()["scores"]] == [0.2, 0.4]


@pytest.mark.ray
def test_an_image_with_which_the_reward_fails_costs_its_own_score(services: dict[str, str], token: None) -> None:
    far = remote(services["fake"], token_env="SCORER_TOKEN")
    found = far.score([*grey(51, 51, 51), *grey(51, prompt="bug"), *grey(51, 51)])
    assert reasons(found) == [*[pytest.approx(0.2)] * 3, "refused", *[pytest.approx(0.2)] * 2]
    assert "ZeroDivisionError: a bug in the reward" in found[3].detail


def test_a_reward_that_always_fails_is_not_asked_about_every_image() -> None:
    from actors.reward_service import RewardService

    service, asked = RewardService(pool("bright", **BRIGHTNESS), ""), list[int]()

    def score(requests: list[RewardRequest]) -> list[Score]:
        asked.append(len(requests))
        raise ValueError("a bug")

    service._reward = SimpleNamespace(score=score)
    for count, attempts in ((64, 6 + 1 + 2), (2, 2), (1, 0)):
        asked.clear()
        found = asyncio.run(service._apart(grey(*range(count)), ValueError("a bug")))
        assert isinstance(found, ValueError) and len(asked) == attempts


def test_an_exception_that_goes_away_in_halves_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    from actors.reward_service import RewardService

    service = RewardService(pool("bright", **BRIGHTNESS), "")

    def score(requests: list[RewardRequest]) -> list[Score]:
        if len(requests) > 1:
            raise ValueError("one at a time")
        return [1.0]

    service._reward = SimpleNamespace(score=score)
    for _ in range(2):
        assert asyncio.run(service._apart(grey(1, 2, 3, 4), None)) == [1.0] * 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("bright: raised ValueError for 4 images: one at a time (") and "test_service.py:" in line


@pytest.mark.parametrize("name", ["clip_source", "kept"])
def test_rewards_of_edits_can_be_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need a source picture in the first request as well."""
    from actors import reward_service
    from deepgen.registry import REWARDS

    asked = list[RewardRequest]()
    monkeypatch.setattr(reward_service, "build_reward", lambda settings: SimpleNamespace(score=asked.extend))
    reward_service.RewardService(pool(name), "")
    assert name in REWARDS and [len(one.references) for one in asked] == [1]


def test_somebody_elses_ray_serve_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    theirs = SimpleNamespace(proxies={"node": "HEALTHY"}, applications={})
    stopped = list[bool]()
    monkeypatch.setattr(serve, "status", lambda: theirs)
    monkeypatch.setattr(serve, "shutdown", lambda: stopped.append(True))
    monkeypatch.setattr("deepgen.cluster.connect.connect", lambda *arguments, **named: False)
    monkeypatch.setattr(sys, "argv", ["serve_rewards.py", "--rewards", "examples.own_reward.brightness:Brightness"])
    with pytest.raises(UserError, match="Ray Serve already runs"):
        serve_rewards.main()
    assert not stopped


@pytest.mark.ray
def test_what_is_no_call_is_refused_in_one_line(services: dict[str, str], token: None) -> None:
    url, headers = services["bright"], {"Authorization": f"Bearer {TOKEN}"}
    for content, sent, status, says in [
        (b"{}", {}, 401, "the token is missing or wrong"),
        (b"{}", {"Authorization": "Bearer other"}, 401, "the token is missing or wrong"),
        (b"\x80\x04pickle", headers, 400, "Invalid JSON"),
        (b'{"version": 9, "requests": [{}]}', headers, 400, "version 9; allowed: 1"),
    ]:
        answer = httpx.post(url, content=content, headers=sent, timeout=60)
        assert (answer.status_code, answer.text.startswith(says)) == (status, True), answer.text
    assert httpx.get(url, headers=headers).status_code == 405
    for wrong, option in ((remote(url), "token_env"), (remote(f"{url}-not", token_env="SCORER_TOKEN"), "url")):
        (missing,) = wrong.score(grey(0))
        assert (missing.reason, missing.options) == ("refused", (option,))


@pytest.mark.ray
def test_a_second_service_and_a_taken_port_are_one_line(services: dict[str, str]) -> None:
    from actors import reward_service

    hosting = reward_service.Hosting("127.0.0.1", 1, "", 1)
    with pytest.raises(UserError, match="--address: Ray Serve already runs"):
        reward_service.start_services([pool("bright", **BRIGHTNESS)], hosting, SOON, gpus=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = reward_service.Hosting("127.0.0.1", taken.getsockname()[1], "", 1)
        with pytest.raises(UserError, match=r"--port: cannot listen on 127.0.0.1, port \d+: Address already in use"):
            reward_service._require_free(busy)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("nosuch.invalid", "--host: got 'nosuch.invalid': "),
        ("::1%nothing", "--host: got '::1%nothing': "),
        ("a" * 64, f"--host: got '{'a' * 64}': "),
        ("198.51.100.7", "--host: cannot listen on 198.51.100.7, port "),
    ],
)
def test_a_host_that_is_not_this_machine_is_one_line(host: str, says: str) -> None:
    from actors.reward_service import Hosting, _require_free

    with pytest.raises(UserError) as raised:
        _require_free(Hosting(host, free_port(), TOKEN, 1))
    assert str(raised.value).startswith(says) and "\n" not in str(raised.value)


def test_a_replica_whose_reward_hangs_is_not_healthy() -> None:
    from actors.reward_service import RewardService

    service = RewardService(pool("bright", **BRIGHTNESS, deadline_s=5.0), "")
    assert service._score(grey(255)) == [1.0]
    service.check_health()
    service._since = time.monotonic() - 4
    service.check_health()
    service._since = time.monotonic() - 6
    with pytest.raises(RuntimeError, match="bright: a batch has taken"):
        service.check_health()


def test_a_replica_whose_reward_is_broken_is_not_healthy() -> None:
    from actors.reward_service import RewardService

    service, asked = RewardService(pool("bright", **BRIGHTNESS), ""), list[int]()

    def score(requests: list[RewardRequest]) -> list[Score]:
        asked.append(len(requests))
        raise RewardBroken("the engine has failed")

    service._reward = SimpleNamespace(score=score)
    service.check_health()
    assert isinstance(asyncio.run(service._apart(grey(0, 255), None)), RewardBroken)
    assert asked == [2]  # a broken engine is not asked about halves
    with pytest.raises(RuntimeError, match="bright: the engine has failed"):
        service.check_health()


class Pairs:
    def score(self, requests: list[RewardRequest]) -> list[Score]:
        raise NotImplementedError

    def score_groups(self, groups: list[list[RewardRequest]]) -> list[list[Score]]:
        raise NotImplementedError


def test_a_reward_that_compares_images_is_not_served() -> None:
    from actors.reward_service import Hosting, start_services

    pairs = pool("pairs", **{"class": "tests.rewards.remote.test_service:Pairs"})
    with pytest.raises(UserError, match=r"rewards\.pairs: compares images of a prompt"):
        start_services([pairs], Hosting("127.0.0.1", 1, "", 1), SOON, gpus=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--rewards: got none; allowed: names of rewards, or a --recipe"),
        (["--rewards", "ocr, ocr"], "--rewards: 'ocr' is there twice"),
        (["--rewards", "clipp"], "--rewards: got 'clipp'; did you mean 'clip'?"),
        (["--rewards", "clip", "rewards.clip.path=/nowhere"], "rewards.clip.path: no file or folder '/nowhere'"),
        (["--rewards", "examples.own_reward.brightness:Dark"], "has no 'Dark'"),
        (["--rewards", "ocr", "--host", "0.0.0.0"], "--host: got '0.0.0.0', which other machines reach, without"),
        (["--rewards", "ocr", "--token-env", "NOT_SET"], "--token-env: the environment variable 'NOT_SET' is not set"),
        (["--rewards", "ocr", "--port", "70000"], "--port: got 70000; allowed: from 1 to 65535"),
        (["--rewards", "ocr", "--prot", "1"], "unrecognized arguments: --prot"),
        (["--rewards", "ocr", "rewards.ocr.words=1"], "unknown key 'rewards.ocr.words'"),
        (["--recipe", "tiny-pretrain", "rewards.weights={}"], "gives no reward a weight"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_rewards.py", *options])
    with pytest.raises(UserError) as raised:
        serve_rewards.main()
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve_rewards.parse(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--rewards", "--host", "--token-env", "docs/remote-rewards.md"))


def test_what_serve_says_of_a_reward_that_does_not_start_is_one_line() -> None:
    from actors.reward_service import _trace, _why

    trace = "Traceback (most recent call last):\n  File x, line 3\ndeepgen.errors.UserError: rewards.a.path: no such\n"
    said = SimpleNamespace(message="Failed to update the deployments", deployments={})
    assert _why(said) == "Failed to update the deployments"
    said.deployments = {"a": SimpleNamespace(message=trace)}
    assert _why(said) == "rewards.a.path: no such" and _trace(said) == ""
    said.deployments = {"a": SimpleNamespace(message=json.dumps(1) + "\nray.x.RayTaskError(ValueError): odd\n")}
    assert _why(said) == "RayTaskError(ValueError): odd"
    assert _trace(said).endswith("ray.x.RayTaskError(ValueError): odd\n")
