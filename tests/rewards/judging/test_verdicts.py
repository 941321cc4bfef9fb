"""Verdicts: scores of answers, and answers that hold none."""

from __future__ import annotations

import math
import re

import pytest

from rewards import Missing
from rewards.judging.questions import Answer
from rewards.judging.verdicts import BETTER, choice_probabilities, combined, first_wins, graded, parsed, yes


def first(**probabilities: float) -> Answer:
    """An answer whose first token has these probabilities."""
    tokens = {name.replace("_", " "): p for name, p in probabilities.items()}
    return Answer("", tuple((token, math.log(p)) for token, p in tokens.items()))


def digits(*probabilities: float) -> Answer:
    return Answer("", tuple((str(index), math.log(p)) for index, p in enumerate(probabilities) if p))


def reason(score: object) -> str:
    assert isinstance(score, Missing), score
    return score.reason


def test_yes_is_its_share_among_yes_and_no_in_any_spelling() -> None:
    assert yes(first(Yes=0.6, No=0.2, The=0.2)) == pytest.approx(0.75)
    assert yes(first(Yes=0.3, yes=0.1, _Yes=0.1, YES=0.1, No=0.1, _no=0.1, Maybe=0.2)) == pytest.approx(0.75)
    assert yes(first(Yes=0.9)) == 1.0
    assert yes(Answer("", (("Yes", -0.1), ("No", -math.inf)))) == 1.0


def test_an_answer_to_something_else_is_no_verdict() -> None:
    vague = yes(first(The=0.9, Yes=0.06, No=0.01))
    assert vague == Missing("parse", "the answer begins with 'The', not Yes or No")
    unsure = yes(first(No=0.06, Yes=0.02, A=0.01))
    assert unsure == Missing("parse", "the answer begins with Yes or No with a probability of 0.08; allowed: from 0.1")
    assert reason(yes(Answer("Yes"))) == "parse"  # sampled, but without log-probabilities
    assert reason(yes(Answer("", (("Yes", math.nan), ("No", -1.0))))) == "parse"


def test_a_grade_is_the_expectation_over_its_digits() -> None:
    assert graded(digits(0, 0.1, 0, 0, 0.5, 0.4), 1, 5) == pytest.approx(0.1 + 2.0 + 2.0)
    assert graded(digits(0.4, 0.2, 0.2, 0.2), 1, 3) == pytest.approx(2.0)  # 0 is no grade here
    assert reason(graded(first(Yes=1.0), 1, 5)) == "parse"
    assert graded(digits(0, 1.0), 1, 5) == 1.0


def test_probabilities_sum_to_one() -> None:
    probabilities = choice_probabilities(digits(0.1, 0.2, 0.3), ["0", "1", "2"])
    assert probabilities == pytest.approx([1 / 6, 2 / 6, 3 / 6])


SCORE = re.compile(r"Final Score: ([-\w.]+)")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4.0),
        ("Final Score: 2. No: it has text.\nFinal Score: 4.25", 4.25),
        ("Final Score: 1", 1.0),
        ("The hands are odd. Final Score: 2.", 2.0),
        ("Final Score: 5", 5.0),
    ],
)
def test_the_last_number_is_the_score(text: str, score: float) -> None:
    assert parsed(Answer(text), SCORE, 1, 5) == score


@pytest.mark.parametrize("text", ["", "good", "Final Score: 5.1", "Final Score: 1000000", "Final Score: nan"])
@pytest.mark.parametrize("more", ["", "\nFinal Score: inf", "\nFinal Score: -1", "\nFinal Score: 1e9"])
def test_text_without_a_number_in_range_has_no_score(text: str, more: str) -> None:
    assert reason(parsed(Answer(text + more), SCORE, 1, 5)) == "parse"


def test_an_answer_that_was_cut_has_no_verdict() -> None:
    """What matches last may be a thought, or the 1 of 10."""
    for text in ("Hands: Final Score: 2. Face: Final Score: 4. All in all, it", "Final Score: 1"):
        assert reason(parsed(Answer(text, cut=True), SCORE, 1, 5)) == "parse"
    assert reason(first_wins(Answer("<answer>Image 1 is better</answer> But", cut=True), re.compile(BETTER))) == "parse"


def test_verdicts_of_unified_reward_think() -> None:
    pattern = re.compile(BETTER)
    thinking = "<think>Image 2 is better at hands. Overall, Image 1 is better.</think>\n"
    assert first_wins(Answer(thinking + "<answer>Image 1 is better</answer>"), pattern) == 1.0
    assert first_wins(Answer(thinking + "<answer>\nSo Image 2 is better.\n</answer>"), pattern) == 0.0
    for text in (
        thinking,
        thinking + "<answer>Image 1 is better",  # cut off
        "<answer>Image 1 is better, no, Image 2 is better</answer>",
        "<answer>Image 3 is better</answer>",
        "<answer>Both are equal</answer>",
    ):
        assert reason(first_wins(Answer(text), pattern)) == "parse"


def test_a_choice_between_two_images_by_log_probabilities() -> None:
    assert first_wins(digits(0, 0.6, 0.2), None) == pytest.approx(0.75)
    assert reason(first_wins(Answer("1"), None)) == "parse"


def test_several_questions_make_one_score() -> None:
    assert combined([0.2, 0.6], "mean") == pytest.approx(0.4)
    assert combined([0.2, 0.6], "min") == 0.2
    lost = Missing("deadline", "late")
    assert combined([0.2, lost], "mean") == combined([lost, 0.2], "min") == lost
