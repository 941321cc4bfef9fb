"""Weights of rewards: numbers, or numbers that change over the first steps, in rows by task or by data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

LARGEST = 1e6  # times a score it stays finite in fp32
BY_SOURCE = "source:"  # begins the name of a row for the prompts of one data set


class WeightRule:
    """Annotation of a weight: 0 to LARGEST, or [first, last, steps] for one that changes linearly over steps."""

    allowed = "a weight >= 0, at most 1e6, or [first, last, steps] for one that changes over the first steps"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    @staticmethod
    def _check(given: Any) -> float | tuple[float, float, int]:
        if _is_weight(given):
            return float(given)
        if isinstance(given, list | tuple) and len(given) == 3:
            first, last, steps = given
            if _is_weight(first) and _is_weight(last) and type(steps) is int and steps >= 1:
                return float(first), float(last), steps
        raise PydanticCustomError("weight", "not a weight")


RewardWeight = Annotated[float | tuple[float, float, int], WeightRule()]


def _is_weight(given: Any) -> bool:
    return type(given) in (int, float) and 0 <= given <= LARGEST


def weight_at(weight: RewardWeight, step: int | None) -> float:
    """The weight in a training step, counted from 0; None: after all steps that change it."""
    if not isinstance(weight, tuple):
        return weight
    first, last, steps = weight
    if step is None or step >= steps:
        return last
    return first + (last - first) * step / steps


def ever_positive(weight: RewardWeight) -> bool:
    """Whether the weight is above 0 in some step."""
    return weight_at(weight, 0) > 0 or weight_at(weight, None) > 0


def check_row(key: str, row: Mapping[str, RewardWeight]) -> None:
    """Raise ValueError for a row that has rewards, but none in its first step or none in the end.

    In every step between, a weight that is above 0 at one of its ends is above 0.
    """
    for step, when in ((0, "at step 0"), (None, "in the end")):
        if any(map(ever_positive, row.values())) and not any(weight_at(weight, step) for weight in row.values()):
            raise ValueError(
                f"{key}: every weight is 0 {when}, where its prompts would teach nothing; "
                f"allowed: one above 0 {when} beside those that change"
            )
