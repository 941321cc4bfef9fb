"""Chooses the held-out records that an evaluation draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from deepgen.config import Settings, UserError
from deepgen.config.settings import TASKS
from deepgen.data.records import Record, first_reserved
from deepgen.data.usable import special_tokens, usable_records

GRID_PROMPTS = 8  # prompts in a grid during training
ROW_PROMPTS = 16  # prompts in the before/after grid


def heldout_records(settings: Settings, *, say: Callable[[str], None] = print) -> list[Record]:
    """At most evaluation.prompts held-out prompts, the same number of each task where possible; [] if it is 0.

    The choice depends only on the file and evaluation.seed, so runs that are compared draw the same prompts. Unusable
    prompts are left out, see `usable_records`. Raises UserError if evaluation.negative_prompt has a reserved token.
    """
    count, seed = settings.evaluation.prompts, settings.evaluation.seed
    if not count:
        return []
    negative = settings.evaluation.negative_prompt
    if token := first_reserved(negative, special_tokens(Path(settings.model.weights) / "tokenizer")):
        raise UserError(f"evaluation.negative_prompt: got {negative[:60]!r} with the reserved token {token}; remove it")
    found = usable_records(settings, "data.heldout", lambda records: choose_records(records, count, seed), say)
    return [record for _, record in found]


def choose_records(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """At most `count` random records, taken from the tasks in turn, in the order of `records`."""
    rng = random.Random(seed)
    by_task = [[i for i, record in enumerate(records) if record.task == task] for task in TASKS]
    for numbers in by_task:
        rng.shuffle(numbers)
    longest = max(map(len, by_task))
    in_turn = [numbers[place] for place in range(longest) for numbers in by_task if place < len(numbers)]
    return [records[i] for i in sorted(in_turn[:count])]
