"""The remote scorers' protocol: what is sent arrives, and what is wrong costs one request or is one line."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards import Missing, RewardRequest, Score, is_truth
from rewards.remote import protocol
from rewards.remote.protocol import ProtocolError, fault, questions, read_answer, read_question, write_answer


def noise(side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 1, 3), dtype=np.uint8)


def body(*requests: Any, version: int = 1) -> bytes:
    return json.dumps({"version": version, "requests": requests}).encode()


def encoded(image: np.ndarray, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def one(**changed: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "task": "t2i", "image": encoded(noise())} | changed


def bomb(width: int, height: int) -> str:
    """A PNG file of a few bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return base64.b64encode(data).decode()


def test_what_is_sent_arrives() -> None:
    sent = [
        RewardRequest("eine „Katze“ 猫", "a cat", "t2i", noise()),
        RewardRequest("make it \x00 blue\n", "", "edit", noise(5, 1), (noise(6, 2), noise(7, 3))),
    ]
    (count, packed), *others = questions(sent)
    assert (count, others) == (2, [])
    for read, given in zip(read_question(packed), sent, strict=True):
        assert isinstance(read, RewardRequest)
        assert (read.prompt, read.answer, read.task) == (given.prompt, given.answer, given.task)
        for got, image in zip((read.image, *read.references), (given.image, *given.references), strict=True):
            np.testing.assert_array_equal(got, image)


def test_large_batches_are_several_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [RewardRequest(str(n), "", "t2i", noise(8, n)) for n in range(10)]
    monkeypatch.setattr(protocol, "MAX_BODY_PIXELS", 3 * 72)
    by_pixels = list(questions(requests))
    assert [count for count, _ in by_pixels] == [3, 3, 3, 1]
    prompts = [read.prompt for _, packed in by_pixels for read in read_question(packed)]  # type: ignore[union-attr]
    assert prompts == [str(n) for n in range(10)]
    monkeypatch.setattr(protocol, "MAX_BODY", 100 + 2 * len(by_pixels[-1][1]))
    assert max(len(packed) for _, packed in questions(requests)) <= protocol.MAX_BODY
    assert list(questions([])) == []


@pytest.mark.parametrize(
    ("given", "reason", "says"),
    [
        (one(image="x"), "refused", "no base64"),
        (one(image=encoded(noise(), "JPEG")), "refused", "no PNG file"),
        (one(image=base64.b64encode(b"\x89PNG\r\n\x1a\nxx").decode()), "refused", "without a readable header"),
        (one(image=encoded(noise(64))[:400]), "refused", "not a readable image"),
        (one(image=bomb(5000, 5000)), "too_long", "25,000,000 pixels; allowed: 16,777,216"),
        (one(prompt="a" * 20_001), "too_long", "prompt: String should have at most 20000 characters"),
        (one(references=["x"] * 9), "too_long", "references: List should have at most 8 items"),
        (one(seed=3), "refused", "seed: Extra inputs are not permitted"),
        (one(task="zzz\n"), "refused", r"task: got 'zzz\n'; allowed: t2i, reasoning, text, edit"),
        (one(prompt=3), "refused", "prompt: Input should be a valid string"),
        ("a cat", "refused", "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_request_costs_only_itself(given: Any, reason: str, says: str) -> None:
    good, bad, other = read_question(body(one(), given, one()))
    assert isinstance(good, RewardRequest) and isinstance(other, RewardRequest)
    assert isinstance(bad, Missing) and bad.reason == reason
    assert says in bad.detail and "\n" not in bad.detail and len(bad.detail) <= protocol.MAX_DETAIL


def test_pixels_of_a_body_are_bounded_before_they_are_decoded() -> None:
    answers = read_question(body(*[one(image=bomb(4096, 4096))] * 10))
    # The first eight are within the limits and damaged, the others are not looked at.
    assert [missing.reason for missing in answers if isinstance(missing, Missing)] == ["refused"] * 8 + ["too_long"] * 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"", "Invalid JSON"),
        (b"\x80\x04\x95", "Invalid JSON"),  # a pickle
        (b"[" * 100_000, "Invalid JSON"),
        (body(one(), version=2), "version 2; allowed: 1"),
        (body(), "requests: List should have at least 1 item"),
        (body(*[1] * 257), "requests: List should have at most 256 items"),
        (b'{"requests": [1]}', "version: Field required"),
        (body(*[[1] * 2000] * 256), "body with 512,000 commas; allowed: 262,144"),  # each would be an object
    ],
)
def test_a_wrong_body_is_one_line(given: bytes, says: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        read_question(given)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_what_cannot_be_sent_is_said() -> None:
    assert fault(RewardRequest("a cat", "", "t2i", noise())) is None
    for request, says in [
        (RewardRequest("a" * 20_001, "", "t2i", noise()), "prompt of 20,001 letters"),
        (RewardRequest("", "a" * 20_001, "t2i", noise()), "answer of 20,001 letters"),
        (RewardRequest("", "", "edit", noise(), (noise(),) * 9), "9 references"),
        (RewardRequest("", "", "edit", noise(), (np.zeros((4097, 4096, 3), np.uint8),)), "image of 16,781,312 pixels"),
    ]:
        missing = fault(request)
        assert missing is not None and missing.reason == "too_long" and says in missing.detail
    half = fault(RewardRequest("a cat", "\ud83d", "t2i", noise()))
    assert half is not None and half.reason == "refused" and "answer with half a letter" in half.detail


def test_scores_arrive_and_missing_ones_keep_their_reason() -> None:
    sent: list[Score] = [0.25, -3, Missing("deadline", "judge\nlate"), None, float("nan"), float("-inf"), 1e300]
    got, _ = read_answer(write_answer(sent), len(sent))
    assert got[:3] == [0.25, -3.0, Missing("deadline", "judge late")]
    assert [one.reason if isinstance(one, Missing) else one for one in got[3:]] == [
        "refused",
        "parse",
        "parse",
        "parse",
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"score": True},
        {"score": "1"},
        {"score": None},
        {},
        {"score": 1, "missing": "parse"},
        {"missing": "tired"},
        {"detail": "x"},
        0.5,
        None,
    ],
)
def test_a_wrong_score_costs_only_itself(given: Any) -> None:
    answer = json.dumps({"version": 1, "scores": [{"score": 1}, given, {"score": 0.5, "more": 1}]}).encode()
    (first, wrong, last), _ = read_answer(answer, 3)
    assert (first, last) == (1.0, 0.5)
    assert isinstance(wrong, Missing) and wrong.reason == "parse" and wrong.detail


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"0.5",
        b"<html>",
        b"\xff\xfe",
        b'{"version": 1, "scores": [{"score": 1}]}',
        b'{"version": 2, "scores": [{"score": 1}, {"score": 1}]}',
        b'{"version": 1, "scores": {"0": 1, "1": 1}}',
        b'{"version": 1, "scores": [{"score": 1}, {"sco',
        b'{"version": 1, "scores": [{"score": 0.1, "score": 0.9}, {"score": 1}]}',
        b'{"version": 1, "scores": [{"score": 1}, {"score": 1}], "scores": [{"score": 0}, {"score": 0}]}',
        b'{"version": 1, "scores": [{"score": 1}, {"score": 1}], "more": [{"a": 1, "b": {}, "a": 1}]}',
        b'{"version": 1, "scores": [' + b" " * 10_000_000 + b"]}",
    ],
)
def test_a_wrong_answer_gives_no_score(given: bytes) -> None:
    found, _ = read_answer(given, 2)
    assert [type(one) for one in found] == [Missing, Missing]
    assert {one.reason for one in found if isinstance(one, Missing)} == {"parse"}


def test_a_number_of_many_digits_costs_only_itself() -> None:
    (first, second), _ = read_answer(b'{"version": 1, "scores": [{"score": 1%s}, {"score": 0.5}]}' % (b"0" * 2000), 2)
    assert isinstance(first, Missing) and first.reason == "parse" and second == 0.5


@pytest.mark.parametrize("given", [True, False, np.True_, np.array(True)])
def test_what_is_true_or_false_is_no_score(given: Any) -> None:
    assert is_truth(given)
    ((missing,), _) = read_answer(write_answer([given]), 1)
    assert missing == Missing("parse", f"the reward gave {given}, which is no number")
    assert not any(map(is_truth, (1.0, 1, np.float32(1), np.array(1), None, Missing("parse"))))


def test_nan_in_json_is_a_missing_score() -> None:
    (first, second), _ = read_answer(b'{"version": 1, "scores": [{"score": NaN}, {"score": 0.5}]}', 2)
    assert isinstance(first, Missing) and first.reason == "parse"
    assert second == 0.5


def test_details_of_the_other_side_are_one_printable_line_without_secrets() -> None:
    told = "bad\x1b[31m\nBearer abcdefghijklmnop " + "x" * 5000
    ((missing,), _) = read_answer(
        json.dumps({"version": 1, "scores": [{"missing": "parse", "detail": told}]}).encode(), 1
    )
    assert isinstance(missing, Missing)
    assert missing.detail.startswith("bad [31m Bearer *** xxx") and len(missing.detail) == protocol.MAX_DETAIL
