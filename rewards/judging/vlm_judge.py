"""A vision-language model scores one image at a time, with questions from the recipe.

`mode` says how an answer becomes a number: `yes_no` the probability of Yes, `graded` the expectation over digits, both
of the first token; `text` the number that `pattern` finds in a written answer. Several questions make a checklist.
With `sources` the judge sees an edit's source images before the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import model_validator

from deepgen.config import setting
from deepgen.config.schema.choices import OneOf
from rewards.base import Missing, RewardRequest
from rewards.judging.engines import Engine, JudgeOptions, ask_all, asked_about, build_engine, compiled, served_version
from rewards.judging.questions import Answer, Question, fault, unknown_field
from rewards.judging.verdicts import combined, graded, parsed, yes

MODES = ("yes_no", "graded", "text")
YES_NO = ("Does this image show {answer}? Answer Yes or No.",)
GRADED = ("How well does this image show {answer}? Answer with one digit from {lowest} (not at all) to {highest}.",)
_EDIT = "The last image is an edit of the images before it. The instruction was: {prompt}. "
EDIT_YES_NO = (
    _EDIT + "Has the instruction been followed? Answer Yes or No.",
    _EDIT + "Is everything that the instruction does not mention as it was before? Answer Yes or No.",
    _EDIT + "Is the last image free of artefacts and well made? Answer Yes or No.",
)
EDIT_GRADED = tuple(
    question.replace("Answer Yes or No.", "Answer with one digit from {lowest} (not at all) to {highest} (fully).")
    for question in EDIT_YES_NO
)


class VlmJudge:
    """VLM judge with questions of your own: probability of Yes, a grade, or a number read from its answer.

    Raises UserError when the model cannot be loaded or a token is not set.
    """

    class Options(JudgeOptions):
        mode: Annotated[str, OneOf(MODES)] = setting(
            "yes_no", "How an answer becomes a score: probability of Yes, expectation over digits, number in the text."
        )
        questions: list[str] = setting(
            [], "Questions about an image, with {prompt} and {answer}; empty: built-in ones for the mode and sources."
        )
        combine: Annotated[str, OneOf(("mean", "min"))] = setting("mean", "How several questions make one score.")
        lowest: int = setting(1, "Lowest grade, in modes graded and text.")
        highest: int = setting(5, "Highest grade; a digit in mode graded.")
        pattern: str = setting(
            r"Score: *([\d.]+)", "Mode text: regular expression whose one group is the score; its last match counts."
        )

        @model_validator(mode="after")
        def _check(self) -> VlmJudge.Options:
            for number, question in enumerate(self.questions, 1):
                if not question.strip():
                    raise ValueError(f"questions: got {question!r} as number {number}; allowed: text, or no questions")
                if name := unknown_field(question):
                    raise ValueError(f"questions: got the field {name}; allowed: {{prompt}}, {{answer}}")
            if self.mode == "text" and not self.questions:
                raise ValueError("questions: got none in mode text; allowed: one or more, which say how to answer")
            if self.lowest >= self.highest:
                raise ValueError(f"lowest: got {self.lowest}; allowed: less than highest, {self.highest}")
            if self.mode == "graded" and not 0 <= self.lowest < self.highest <= 9:
                raise ValueError(f"highest: got grades {self.lowest} to {self.highest} in mode graded; allowed: digits")
            compiled(self.pattern, "pattern")
            return self

        def asked(self) -> tuple[str, ...]:
            """The templates of the questions."""
            if self.questions:
                return tuple(self.questions)
            edits, others = (EDIT_GRADED, GRADED) if self.mode == "graded" else (EDIT_YES_NO, YES_NO)
            chosen = edits if self.sources else others
            return tuple(
                text.replace("{lowest}", str(self.lowest)).replace("{highest}", str(self.highest)) for text in chosen
            )

    def __init__(self, options: Options, engine: Engine | None = None) -> None:
        """engine: what answers; default: the one that the options describe."""
        self._options, self._templates = options, options.asked()
        self._pattern = compiled(options.pattern, "pattern") if options.mode == "text" else None
        self._engine = engine or build_engine(options, options.sources + 1)
        self.version = served_version(options)

    def score(self, requests: Sequence[RewardRequest]) -> list[float | Missing]:
        """One score per request: a probability 0..1, or a grade from lowest to highest.

        Raises RewardUnavailable when no question reached the endpoint.
        """
        asked = [self._question(template, request) for request in requests for template in self._templates]
        verdicts = [self._verdict(answer) for answer in ask_all(self._engine, asked)]
        size = len(self._templates)
        return [combined(verdicts[start : start + size], self._options.combine) for start in range(0, len(asked), size)]

    def _question(self, template: str, request: RewardRequest) -> Question | Missing:
        refused = fault(template, request, reserved=self._engine.reserved, pattern=self._pattern)
        return refused or asked_about([request], template, self._options, choices=self._pattern is None)

    def _verdict(self, answer: Answer | Missing) -> float | Missing:
        if isinstance(answer, Missing):
            return answer
        options = self._options
        if self._pattern is not None:
            return parsed(answer, self._pattern, options.lowest, options.highest)
        return graded(answer, options.lowest, options.highest) if options.mode == "graded" else yes(answer)
