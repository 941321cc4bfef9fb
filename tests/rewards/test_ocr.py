"""The OCR reward: the scoring rule on plain strings, and RapidOCR on drawn words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rewards.base import Missing, RewardRequest
from rewards.ocr import OcrReward, edit_distance, normalise, target_words, text_accuracy


def accuracy(targets: str, *lines: str) -> float:
    return text_accuracy([normalise(word) for word in targets.split("|")], lines)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("a", "a", 0)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_target_words_are_the_quoted_segments_without_case_and_spaces() -> None:
    assert target_words('a sign "Big Sale" and "ＮＯＷ" and " "') == ["bigsale", "now"]
    assert target_words("a menu that says “Menu”, 牌子上写着「你好」") == ["menu", "你好"]
    assert target_words("a sign that says SALE") == target_words('a 19" rack next to a 24" monitor') == []


@pytest.mark.parametrize(
    ("targets", "lines", "expected"),
    [
        ("SALE", ["SALE"], 1.0),
        ("SALE", ["s a l e"], 1.0),  # one n-gram of four letters is the full concatenation
        ("SALE", ["sale"], 1.0),
        ("SALE", ["SAL"], 0.75),
        ("SALE", ["SOLE"], 0.75),
        ("SALE", [], 0.0),
        ("SALE", ["wxyzq"], 0.0),
        ("big sale", ["BIG", "SALE"], 1.0),  # a target over two lines
        ("big|sale", ["SALE", "BIG"], 1.0),  # order does not matter for separate targets
        ("big|sale", ["bigsale"], 1.0),  # recognised without the space
        ("big|sale", ["BIG"], 3 / 7),  # weighted by length
        ("ha|ha", ["ha"], 0.5),  # one word does not serve two targets
        ("大减价", ["大减价"], 1.0),
        ("大减价", ["大减介"], 2 / 3),
        ("été", ["ÉTÉ"], 1.0),
    ],
)
def test_accuracy(targets: str, lines: list[str], expected: float) -> None:
    assert accuracy(targets, *lines) == pytest.approx(expected)


def test_extra_text_costs_credit() -> None:
    assert accuracy("sale", "sale now") == pytest.approx(4 / 7)
    assert accuracy("sale", "xxsalexx") == pytest.approx(0.5)
    assert accuracy("sale", "sale sale sale") == pytest.approx(1 / 3)
    assert accuracy("sale", "sale") > accuracy("sale", "sale x") > accuracy("sale", "sale now now now")


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward()


def drawn(word: str, ink: str = "black", paper: str = "white") -> np.ndarray:
    picture = Image.new("RGB", (64, 64), paper)
    font = ImageFont.load_default(size=18)  # ships with Pillow, so it is the same on every machine
    ImageDraw.Draw(picture).text((32, 32), word, fill=ink, font=font, anchor="mm")
    return np.asarray(picture)


def request(prompt: str, image: np.ndarray) -> RewardRequest:
    return RewardRequest(prompt=prompt, answer="", task="text", image=image)


def test_reads_drawn_words(reward: OcrReward) -> None:
    words = ["CAT", "OPEN", "42"]
    requests = [request(f'the word "{word}"', drawn(word, ink="red", paper="lightblue")) for word in words]
    assert reward.score(requests) == [1.0, 1.0, 1.0]


def test_wrong_extra_and_missing_words_score_less(reward: OcrReward) -> None:
    wrong, extra, nothing = reward.score(
        [
            request('a sign "CAT"', drawn("DOG")),
            request('a sign "CAT"', drawn("CAT\nNOW")),
            request('a sign "CAT"', np.full((64, 64, 3), 128, np.uint8)),
        ]
    )
    assert wrong == nothing == 0.0
    assert extra == pytest.approx(0.5)


def test_a_strip_is_not_read(reward: OcrReward) -> None:
    """RapidOCR raises an error for the first, and takes gigabytes for the second."""
    for shape in ((10_000, 1, 3), (1, 1999, 3)):
        (score,) = reward.score([RewardRequest('a sign "OK"', "", "text", np.zeros(shape, np.uint8))])
        assert isinstance(score, Missing) and score.reason == "refused" and "allowed: sides" in score.detail
    (score,) = reward.score([RewardRequest('a sign "OK"', "", "text", np.zeros((1, 2, 3), np.uint8))])
    assert score == 0.0


def test_prompt_without_quotes_is_not_applicable_and_none(reward: OcrReward) -> None:
    plain = request("a cat", drawn("CAT"))
    assert not OcrReward.applies(plain)
    assert OcrReward.applies(request('a "cat"', plain.image))
    assert reward.score([plain]) == [None]
