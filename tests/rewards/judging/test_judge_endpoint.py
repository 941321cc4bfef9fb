"""The endpoint: what it sends, what it reads, and what happens when the server misbehaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from rewards import Missing
from rewards.judging.judge_endpoint import MAX_ANSWER_BYTES, EndpointEngine, read_answer
from rewards.judging.questions import Answer, Question
from tests.helpers.chat_server import chat_server, question_of, reply_of
from tests.helpers.fault_server import fault_server
from tests.helpers.servers import endless, reply, server

YES = Answer("Yes", (("Yes", -0.1), ("No", -2.5)))
GOOD = json.dumps(reply_of(YES)).encode()
IMAGES = tuple(np.random.default_rng(0).integers(0, 256, (2, 9, 13, 3), dtype=np.uint8))
QUESTION = Question("Is it good?", IMAGES[:1])


def engine(base: str, **options: Any) -> EndpointEngine:
    return EndpointEngine(base, "judge", backoff_s=0.005, **options)


def reason(answer: Answer | Missing) -> str:
    assert isinstance(answer, Missing), answer
    assert "\n" not in answer.detail
    return answer.reason


def test_a_question_arrives_as_it_was_asked() -> None:
    asked = Question("Which?", IMAGES, "Be strict.", 7, 0.5, choices=False)
    with chat_server(lambda body: (200, GOOD)) as (base, requests):
        judge = EndpointEngine(base + "/", "some/judge", token="t0ken")
        assert judge.ask([asked, QUESTION]) == [Answer("Yes"), YES]
    headers, body = next(sent for sent in requests if sent[1]["max_tokens"] == 7)
    assert headers["Authorization"] == "Bearer t0ken" and body["model"] == "some/judge"
    assert "logprobs" not in body
    arrived = question_of(body)
    assert (arrived.text, arrived.system, arrived.max_tokens, arrived.temperature) == ("Which?", "Be strict.", 7, 0.5)
    for image, sent in zip(arrived.images, IMAGES, strict=True):
        np.testing.assert_array_equal(image, sent)  # PNG loses nothing
    other = next(sent[1] for sent in requests if sent[1]["max_tokens"] == 1)
    assert (other["logprobs"], other["top_logprobs"]) == (True, 20) and len(other["messages"]) == 1


def test_jpeg_is_sent_where_wanted() -> None:
    with chat_server(lambda body: (200, GOOD)) as (base, requests):
        assert engine(base, jpeg_quality=90).ask([QUESTION]) == [YES]
    (part, _) = requests[0][1]["messages"][0]["content"]
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "Authorization" not in requests[0][0]


def test_answers_come_in_the_order_of_the_questions_and_no_more_at_once_than_allowed() -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        number = int(question_of(body).text)
        time.sleep(0.02 if number % 2 else 0.04)
        with lock:
            busy -= 1
        return 200, json.dumps(reply_of(Answer(str(number)))).encode()

    questions = [Question(str(number), (), choices=False) for number in range(12)]
    with chat_server(answer) as (base, _):
        found = engine(base, concurrency=3).ask(questions)
    assert found == [Answer(str(number)) for number in range(12)]
    assert most == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    answers = iter([(status, b"busy"), (200, GOOD)])
    with chat_server(lambda body: next(answers), Retry_After="0") as (base, requests):
        assert engine(base).ask([QUESTION]) == [YES]
    assert len(requests) == 2


def test_retry_after_is_waited_for_within_the_deadline() -> None:
    with chat_server(lambda body: (429, b"slow down"), Retry_After="9") as (base, requests):
        began = time.monotonic()
        (late,) = engine(base, deadline_s=0.3).ask([QUESTION])
    assert reason(late) == "deadline" and len(requests) == 1
    assert time.monotonic() - began < 2


def test_a_server_that_never_works_is_a_transport_error() -> None:
    with chat_server(lambda body: (500, b"the key t0ken\nis unknown")) as (base, requests):
        (lost,) = engine(base, token="t0ken").ask([QUESTION])
        assert lost == Missing("transport", f"{base}/chat/completions: status 500: the key *** is unknown")
        assert len(requests) == 3
    (gone,) = engine(base).ask([QUESTION])  # nobody listens any more
    assert reason(gone) == "transport"


@pytest.mark.parametrize(
    ("status", "said", "why"),
    [
        (401, b"no", "refused"),
        (404, b'{"error": "no model judge"}', "refused"),
        (400, b"This model's maximum context length is 1024 tokens", "too_long"),
        (413, b"", "too_long"),
        (302, b"", "refused"),
        (200, b"", "parse"),
        (200, b"<html>", "parse"),
        (200, b"[]", "parse"),
        (200, b"[" * 100_000, "parse"),
        (200, b"\xff\xfe", "parse"),
        (200, b"{}", "parse"),
        (200, b'{"choices": []}', "parse"),
        (200, b'{"choices": [{"message": {"content": 3}, "logprobs": null}]}', "parse"),
        (200, b"x" * (MAX_ANSWER_BYTES + 1), "parse"),
        (200, json.dumps(reply_of(Answer("Yes"))).encode(), "parse"),  # no log-probabilities
        (200, GOOD.replace(b"-2.5", b"NaN"), "parse"),
        (200, GOOD.replace(b"-2.5", b"7.5"), "parse"),
        (200, GOOD.replace(b"-2.5", b'"many"'), "parse"),
        (200, GOOD.replace(b'"Yes", "logprob"', b'{}, "logprob"'), "parse"),
        (200, GOOD.replace(b"-2.5", b"-1" + b"0" * 400), "parse"),  # no float holds it
        (200, b'{"choices": [{"finish_reason": "content_filter", "message": {}}]}', "refused"),
    ],
)
def test_what_cannot_be_read_is_asked_once_and_missing(status: int, said: bytes, why: str) -> None:
    with chat_server(lambda body: (status, said)) as (base, requests):
        (found,) = engine(base).ask([QUESTION])
    assert reason(found) == why
    assert len(requests) == 1


def test_servers_that_break_off_trickle_or_send_for_ever() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 500000000\r\n\r\n"
    with server({"": lambda connection, _: connection.sendall(head + GOOD[:20])}) as port:
        (half,) = engine(f"http://127.0.0.1:{port}/v1", deadline_s=5).ask([QUESTION])
    assert reason(half) == "transport"
    with server({"": endless(head, b" ", 0.05)}) as port:
        began = time.monotonic()
        (slow,) = engine(f"http://127.0.0.1:{port}/v1", deadline_s=0.4).ask([QUESTION])
    assert reason(slow) == "deadline" and time.monotonic() - began < 2
    with server({"": endless(head, b" " * 100_000, 0)}) as port:
        (endless_one,) = engine(f"http://127.0.0.1:{port}/v1", deadline_s=20).ask([QUESTION])
    assert reason(endless_one) == "parse"
    with server({"": reply(b"", "200 OK", "Content-Encoding: gzip")}) as port:
        (empty,) = engine(f"http://127.0.0.1:{port}/v1", deadline_s=5).ask([QUESTION])
    assert reason(empty) == "parse"


def test_a_second_answer_is_not_that_of_the_next_question() -> None:
    def of(path: str, body: bytes) -> Any:
        return reply_of(Answer("Yes", (("Yes", -float(json.loads(body)["messages"][0]["content"][-1]["text"])),)))

    questions = [Question(f"{number}", ()) for number in range(1, 5)]
    with fault_server(of, script=["twice"] * 4) as judge:
        found = engine(judge.url, concurrency=1).ask(questions)
    assert found == [Answer("Yes", (("Yes", -float(number)),)) for number in range(1, 5)]


def test_a_caller_with_a_loop_of_its_own_may_ask() -> None:
    async def caller(base: str) -> list[Answer | Missing]:
        return engine(base).ask([QUESTION])

    with chat_server(lambda body: (200, GOOD)) as (base, _):
        assert asyncio.run(caller(base)) == [YES]


def test_one_bad_answer_disturbs_no_other() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        return (200, GOOD) if question_of(body).text == "good" else (400, b"bad")

    questions = [Question(text, (), choices=True) for text in ("good", "bad", "good")]
    with chat_server(answer) as (base, _):
        found = engine(base).ask(questions)
    assert found[0] == found[2] == YES and reason(found[1]) == "refused"


def test_a_text_says_whether_it_was_cut() -> None:
    reply = b'{"choices": [{"finish_reason": "%s", "message": {"content": "Score: 1"}}]}'
    assert read_answer(reply % b"length", choices=False) == Answer("Score: 1", cut=True)
    assert read_answer(reply % b"stop", choices=False) == Answer("Score: 1")


def test_an_answer_may_have_no_words() -> None:
    assert read_answer(b'{"choices": [{"message": {"content": null}}]}', choices=False) == Answer("")


def test_words_for_the_log_have_no_escapes_of_a_terminal() -> None:
    with chat_server(lambda body: (400, b"\x1b[2Jno\x07")) as (base, _):
        (found,) = engine(base).ask([QUESTION])
    assert isinstance(found, Missing) and found.detail.isprintable()


def test_a_judge_on_this_machine_is_asked_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get token and images, and look for its own 127.0.0.1."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with chat_server(lambda body: (200, GOOD)) as (base, _):
        assert engine(base, token="t0ken").ask([QUESTION]) == [YES]
