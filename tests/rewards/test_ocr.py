"""The OCR reward: the scoring rule on plain strings, and RapidOCR on drawn words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from deepgen.config.schema.pools import make_pool
from rewards import build_reward
from rewards.base import Missing, RewardRequest
from rewards.look_alikes import fold_look_alikes
from rewards.ocr import OcrReward, TextRules, edit_distance, normalise, target_words, text_accuracy

CASED, LETTERS, ALIKE = TextRules(match_case=True), TextRules(punctuation=False), TextRules(look_alikes=True)


def accuracy(targets: str, *lines: str, rules: TextRules | None = None) -> float:
    rules = rules or TextRules()
    return text_accuracy([normalise(word, rules) for word in targets.split("|")], lines, rules)


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


def test_letters_are_equal_however_they_are_encoded() -> None:
    assert accuracy("ｶﾞ １２", "ガ12") == 1.0  # half and full width
    assert accuracy("Cafe\u0301", "CAFÉ") == accuracy("café", "CAFE\u0301") == 1.0
    assert accuracy("café", "cafe") == 0.75
    assert accuracy("Don’t – Walk", "DON'T-WALK") == accuracy("don't", "DON´T") == 1.0
    assert accuracy("sale\u200b\ufe0f", "\u00adSALE") == 1.0  # zero width, a selector, a soft hyphen
    assert accuracy("Straße", "STRASSE") == 1.0


def test_case_and_punctuation_by_the_rules() -> None:
    assert accuracy("Sale", "SALE", rules=CASED) == 0.25
    assert accuracy("Sale", "Sale", rules=CASED) == 1.0
    assert accuracy("SALE!", "sale") == 0.8
    assert accuracy("SALE!", "sale", rules=LETTERS) == accuracy("大减价", "「大减价。」", rules=LETTERS) == 1.0
    assert accuracy("big sale", "BIG", "--", "SALE", rules=LETTERS) == 1.0  # neighbours once the dashes are gone


def test_look_alikes_by_the_rules() -> None:
    for target, read in [
        ("OIL", "0I1"),
        ("МОСКВА", "MOCKBA"),
        ("москва", "MOCKBA"),
        ("ΑΘΗΝΑ", "AΘHNA"),
        ("Hello", "HEL1O"),
    ]:
        assert accuracy(target, read) < 1.0 == accuracy(target, read, rules=ALIKE)
    for target, read in [("S5", "55"), ("vn", "nv"), ("RN", "M")]:
        assert accuracy(target, read, rules=ALIKE) == accuracy(target, read) < 1.0
    assert fold_look_alikes("lIL oO0", match_case=True) == "11L o00"


def test_a_target_of_more_words_than_ngram_loses_credit() -> None:
    lines = ["NOW", "A", "BC", "DE", "FG"]
    assert accuracy("abcdefg|no", *lines, rules=TextRules(ngram=4)) == 0.9
    assert accuracy("abcdefg|no", *lines, rules=TextRules(ngram=1)) < 0.9


def test_options_reach_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"match_case": True, "punctuation": False, "look_alikes": True, "ngram": 1}
    reward = build_reward(make_pool("ocr", given))
    assert isinstance(reward, OcrReward)
    monkeypatch.setattr(reward, "read", lambda image: ["0pen!"])
    asked = [request(f'a sign "{word}"', drawn("")) for word in ("Open", "open", "?!")]
    right, wrong, nothing = reward.score(asked)
    assert (right, wrong) == (1.0, 0.75)
    assert isinstance(nothing, Missing) and nothing.reason == "refused"


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
