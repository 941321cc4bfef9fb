"""How a judge's answer becomes a score. A verdict that is not there is a `Missing`, never a middle value.

Choices are read from the log-probabilities of the first token, which changes smoothly with the image where a sampled
answer jumps. Tokens that differ only in case or in spaces around them count as one choice. Only the likeliest tokens
are known (20 of them, what OpenAI's form allows), and a choice that is not among them counts as probability 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rewards.base import Missing
from rewards.judging.questions import Answer

LEAST_MASS = 0.1  # of the first token's probability, on the choices together; below, the judge answers something else
# The verdict of UnifiedReward-Think. Between the tags it stands once; two verdicts in one pair of tags are none.
BETTER = r"<answer>(?:(?!is better)[^<])*Image ([12]) is better(?:(?!is better)[^<])*</answer>"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def choice_probabilities(answer: Answer, choices: Sequence[str]) -> list[float] | Missing:
    """Probability of each choice as the answer's first token, scaled so that they sum to 1."""
    if not answer.first:
        return Missing("parse", "the answer has no log-probabilities")
    mass = dict.fromkeys((_folded(choice) for choice in choices), 0.0)
    for token, logprob in answer.first:
        if _folded(token) in mass:
            mass[_folded(token)] += math.exp(logprob)
    total = sum(mass.values())
    if not total >= LEAST_MASS:  # NaN, too
        wanted, given = " or ".join(choices), answer.first[0][0]
        if _folded(given) in mass:  # the likeliest of many, none of which is likely
            said = f"the answer begins with {wanted} with a probability of {total:.2g}; allowed: from {LEAST_MASS:g}"
            return Missing("parse", said)
        return Missing("parse", f"the answer begins with {_shown(given)}, not {wanted}")
    return [mass[_folded(choice)] / total for choice in choices]


def yes(answer: Answer) -> float | Missing:
    """Probability of Yes against No, 0..1."""
    probabilities = choice_probabilities(answer, ("Yes", "No"))
    return probabilities if isinstance(probabilities, Missing) else probabilities[0]


def graded(answer: Answer, lowest: int, highest: int) -> float | Missing:
    """Expectation of a grade over the digits lowest..highest, each a single one."""
    grades = range(lowest, highest + 1)
    probabilities = choice_probabilities(answer, [str(grade) for grade in grades])
    if isinstance(probabilities, Missing):
        return probabilities
    return sum(grade * probability for grade, probability in zip(grades, probabilities, strict=True))


def parsed(answer: Answer, pattern: re.Pattern[str], lowest: float, highest: float) -> float | Missing:
    """The number in the pattern's group, where it matches last: a judge that thinks aloud gives its verdict last.

    So an answer that was cut has none: what matches in it may be a thought, or half a number.
    """
    if answer.cut:
        return Missing("parse", f"the answer was cut at max_tokens, before its verdict: {_shown(answer.text)}")
    found = None
    for match in pattern.finditer(answer.text):
        found = match
    if found is None:
        return Missing("parse", f"no verdict in {_shown(answer.text)}")
    text = (found[1] or "").strip().rstrip(".")  # the full stop of "Score: 4."
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not lowest <= value <= highest:
        return Missing("parse", f"the verdict {_shown(text)} is no number from {lowest:g} to {highest:g}")
    return value


def first_wins(answer: Answer, pattern: re.Pattern[str] | None) -> float | Missing:
    """Probability, 0..1, that the first of two images is better.

    pattern: its group is 1 or 2 and names the better image; None: the log-probabilities of 1 and 2 are compared.
    """
    if pattern is None:
        probabilities = choice_probabilities(answer, ("1", "2"))
        return probabilities if isinstance(probabilities, Missing) else probabilities[0]
    better = parsed(answer, pattern, 1, 2)
    return better if isinstance(better, Missing) else 2.0 - better


def combined(scores: Sequence[float | Missing], how: str) -> float | Missing:
    """The score of several questions about one image; missing if one of them is: the others are on another scale.

    how: "mean", or "min" for requirements that cannot make up for each other.
    """
    values = []
    for score in scores:
        if isinstance(score, Missing):
            return score
        values.append(score)
    return min(values) if how == "min" else sum(values) / len(values)


def _folded(token: str) -> str:
    return token.strip().casefold()


def _shown(text: str) -> str:
    """The end of an answer, where the verdict should be, in one line."""
    return repr(text if len(text) <= 80 else "…" + text[-80:])
