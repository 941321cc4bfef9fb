"""Which images of a prompt are compared with each other, and how comparisons become scores.

A judge of pairs prefers a position, often the first. A preference that does not depend on the images cancels when every
pair is shown in both orders, and its result is the mean of the two. With one order it cancels only on average: `pairs`
puts every image first about as often as second. (The reference shows the lower index first, so that its biased judge
rewards low indices, M3.8 a.)

docs/judges.md has what fewer comparisons cost.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

TOURNAMENTS = ("full", "ring", "random")


def pairs(size: int, kind: str, partners: int = 4, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs of the images 0..size-1, each pair once.

    kind: "full", all size * (size - 1) / 2; "ring", each image with two others, all in one circle; "random", each with
    `partners` others (one more for some if size and partners are odd), or with all of them if there are no more.
    seed: of the order in the circle and of the random partners. Every image is first in its pairs as often as second,
    as far as its number of partners allows.
    """
    if kind not in TOURNAMENTS:
        raise ValueError(f"tournament {kind!r}; allowed: {', '.join(TOURNAMENTS)}")
    wanted = {"full": size - 1, "ring": 2, "random": partners}[kind]
    generator = random.Random(seed)
    order = generator.sample(range(size), size)
    # A circle of all images, each paired with those some steps ahead: all get the same number of partners.
    steps = list(range(1, (size - 1) // 2 + 1))
    if kind == "random":
        generator.shuffle(steps)
    found: list[tuple[int, int]] = []
    degree = 0
    if size % 2 == 0 and size > 1 and (wanted % 2 == 1 or wanted >= size - 1):
        found += [(order[place], order[place + size // 2]) for place in range(size // 2)]
        degree = 1
    for step in steps:
        if degree >= wanted:
            break
        found += [(order[place], order[(place + step) % size]) for place in range(size)]
        degree += 2
    return found


def mean_wins(size: int, results: Iterable[tuple[int, int, float]]) -> list[float | None]:
    """Share of its comparisons that each image won, 0..1; None for an image without any.

    results: (first, second, probability that the first is better) of each comparison that has a result. A comparison
    without one is not among them, so it counts for neither side.
    """
    won, counted = [0.0] * size, [0] * size
    for first, second, wins in results:
        won[first] += wins
        won[second] += 1.0 - wins
        counted[first] += 1
        counted[second] += 1
    return [total / count if count else None for total, count in zip(won, counted, strict=True)]
