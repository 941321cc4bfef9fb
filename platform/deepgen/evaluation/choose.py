"""Which held-out records an evaluation draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from deepgen.config import Settings
from deepgen.config.settings import TASKS
from deepgen.data.records import Record
from deepgen.data.usable import usable_records

GRID_PROMPTS = 8  # of the grids during training
ROW_PROMPTS = 16  # of the before/after grid


def heldout_records(settings: Settings, *, say: Callable[[str], None] = print) -> list[Record]:
    """The held-out prompts of a run, at most evaluation.prompts, as many of each task as there are; [] for none.

    The choice depends on the file and evaluation.seed only, so runs that are compared draw the same prompts. One that
    cannot be used is left out, see `usable_records`.
    """
    count, seed = settings.evaluation.prompts, settings.evaluation.seed
    if not count:
        return []
    found = usable_records(settings, "data.heldout", lambda records: choose_records(records, count, seed), say)
    return [record for _, record in found]


def choose_records(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """At most `count` records, taking the tasks in turn, in the order of `records`."""
    rng = random.Random(seed)
    by_task = [[i for i, record in enumerate(records) if record.task == task] for task in TASKS]
    for numbers in by_task:
        rng.shuffle(numbers)
    longest = max(map(len, by_task))
    in_turn = [numbers[place] for place in range(longest) for numbers in by_task if place < len(numbers)]
    return [records[i] for i in sorted(in_turn[:count])]
