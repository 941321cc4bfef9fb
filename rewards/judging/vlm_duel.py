"""A vision-language model compares the images of a prompt in pairs; an image's score is its share of wins.

The defaults ask as UnifiedReward-Think is asked (M3.8 a): two images, thinking aloud, `<answer>Image 1 is better`.
Unlike the reference, every pair is shown in both orders, and a comparison without a verdict counts for neither image.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated

from pydantic import model_validator

from deepgen.config import setting
from deepgen.config.schema.choices import OneOf
from rewards.base import Missing, RewardRequest
from rewards.judging.engines import Engine, JudgeOptions, ask_all, asked_about, build_engine, compiled, served_version
from rewards.judging.questions import Question, fault, unknown_field
from rewards.judging.tournaments import TOURNAMENTS, mean_wins, pairs
from rewards.judging.verdicts import BETTER, combined, first_wins

MODES = ("text", "choice")
_SHOWS = (
    "Image 1 and Image 2 were both made for this description: {answer}. Which of them fits it better and looks better? "
)
_EDITS = (
    "The last two images are two edits of what is shown before them. Call the first of these two Image 1 and the "
    "second Image 2. The instruction was: {prompt}. "
    "Which of them follows it better, keeps the rest as it was and looks better? "
)
_WRITE = "Think first. Then end with <answer>Image 1 is better</answer> or <answer>Image 2 is better</answer>."
_CHOOSE = "Answer 1 or 2."


class VlmDuel:
    """VLM judge of pairs: share of its comparisons with the prompt's other images that an image wins, 0..1.

    Raises UserError when the model cannot be loaded or a token is not set.
    """

    class Options(JudgeOptions):
        mode: Annotated[str, OneOf(MODES)] = setting(
            "text", "Where the verdict stands: in a written answer, or in the log-probabilities of 1 and 2."
        )
        question: str = setting("", "About two images, with {prompt} and {answer}; empty: a built-in one.")
        pattern: str = setting(
            BETTER, "Mode text: regular expression whose one group is 1 or 2, the better image; its last match counts."
        )
        max_tokens: int = setting(4096, "Longest answer in mode text.", unit="tokens", ge=1)
        tournament: Annotated[str, OneOf(TOURNAMENTS)] = setting(
            "full", "Which images meet: all, neighbours in a circle, or some partners each."
        )
        partners: int = setting(4, "Images that each image meets in a random tournament.", ge=1)
        both_orders: bool = setting(True, "Show each pair in both orders, so that a liking for a position cancels.")

        @model_validator(mode="after")
        def _check(self) -> VlmDuel.Options:
            if self.question and not self.question.strip():
                raise ValueError(f"question: got {self.question!r}; allowed: text, or nothing for the built-in one")
            if name := unknown_field(self.question):
                raise ValueError(f"question: got the field {name}; allowed: {{prompt}}, {{answer}}")
            compiled(self.pattern, "pattern")
            return self

        def asked(self) -> str:
            """The template of the question."""
            ending = _WRITE if self.mode == "text" else _CHOOSE
            return self.question or (_EDITS if self.sources else _SHOWS) + ending

    def __init__(self, options: Options, engine: Engine | None = None) -> None:
        """engine: what answers; default: the one that the options describe."""
        self._options, self._template = options, options.asked()
        self._pattern = compiled(options.pattern, "pattern") if options.mode == "text" else None
        self._engine = engine or build_engine(options, options.sources + 2)
        self.version = served_version(options)

    def score_groups(self, groups: Sequence[Sequence[RewardRequest]]) -> list[list[float | Missing]]:
        """One list of scores per group, in order; a group is all images of one prompt.

        Raises RewardUnavailable when no question reached the endpoint.
        """
        shown = [self._shown(group) for group in groups]
        asked = [
            self._question(group, first, second)
            for group, orders in zip(groups, shown, strict=True)
            for first, second in orders
        ]
        answers = iter(ask_all(self._engine, asked))
        scores = []
        for group, orders in zip(groups, shown, strict=True):
            wins: dict[tuple[int, int], float | Missing] = {}
            for order in orders:
                answer = next(answers)
                wins[order] = answer if isinstance(answer, Missing) else first_wins(answer, self._pattern)
            scores.append(group_scores(len(group), wins, self._options.both_orders))
        return scores

    def _shown(self, group: Sequence[RewardRequest]) -> list[tuple[int, int]]:
        """The pairs of a group, each in the order in which it is shown."""
        options = self._options
        seed = zlib.crc32(group[0].prompt.encode()) if group else 0  # the same partners when a group is asked again
        found = pairs(len(group), options.tournament, options.partners, seed)
        return [order for i, j in found for order in ([(i, j), (j, i)] if options.both_orders else [(i, j)])]

    def _question(self, group: Sequence[RewardRequest], first: int, second: int) -> Question | Missing:
        refused = fault(self._template, group[0], reserved=self._engine.reserved, pattern=self._pattern)
        pair = [group[first], group[second]]
        return refused or asked_about(pair, self._template, self._options, choices=self._pattern is None)


def group_scores(size: int, wins: dict[tuple[int, int], float | Missing], both_orders: bool) -> list[float | Missing]:
    """Scores of a group from what was answered: (first, second) -> probability that the first is better.

    With both orders, a pair counts only if both have an answer: a single one would carry the judge's liking for a
    position. An image without any comparison is missing, for the reason that most of its comparisons are.
    """
    if size == 1:
        return [Missing("refused", "a single image has nothing to be compared with")]
    results: list[tuple[int, int, float]] = []
    lost: dict[int, list[Missing]] = defaultdict(list)
    for first, second in wins:
        if both_orders and first > second:
            continue  # counted with its other order
        parts = [wins[first, second]]
        if both_orders:
            back = wins[second, first]
            parts.append(back if isinstance(back, Missing) else 1.0 - back)
        result = combined(parts, "mean")
        if isinstance(result, Missing):
            lost[first].append(result)
            lost[second].append(result)
        else:
            results.append((first, second, result))
    return [_commonest(lost[image]) if score is None else score for image, score in enumerate(mean_wins(size, results))]


def _commonest(lost: Sequence[Missing]) -> Missing:
    reasons = [missing.reason for missing in lost]
    reason = max(reasons, key=reasons.count)
    one = next(missing for missing in lost if missing.reason == reason)
    detail = f"none of {len(lost)} comparisons has a result; one of them: {one.detail}"
    return Missing(reason, detail, one.options)
