"""What a tournament costs: simulated judges of pairs, noisy and with a preference for the first position.

`python -m tests.helpers.noisy_judges` prints the table of docs/judges.md (2000 groups of 8 images, 4 s).
"""

from __future__ import annotations

import sys

import numpy as np

from rewards.judging.tournaments import mean_wins, pairs

SIZE = 8
# name -> (kind, partners, both orders)
DESIGNS = {
    "full": ("full", 0, True),
    "full, one order": ("full", 0, False),
    "random, 6 partners": ("random", 6, True),
    "random, 4 partners": ("random", 4, True),
    "random, 4 partners, one order": ("random", 4, False),
    "ring": ("ring", 0, True),
    "ring, one order": ("ring", 0, False),
    "full, lower index first": ("fixed", 0, False),
}
# name -> (how sharply quality decides, log-odds in favour of the first position)
JUDGES = {"sharp": (4.0, 0.0), "noisy": (1.0, 0.0), "noisy, prefers the first": (1.0, 1.5)}


def verdicts(quality: np.ndarray, sharpness: float, bias: float, generator: np.random.Generator) -> np.ndarray:
    """Sampled verdicts [G, G] of images of a quality [G]: at [i, j] whether i won when it was shown first."""
    odds = sharpness * (quality[:, None] - quality[None, :]) + bias
    return (generator.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(np.float64)


def scores(found: list[tuple[int, int]], won: np.ndarray, both: bool) -> np.ndarray:
    """Mean wins [G] of a tournament with these verdicts."""
    results = [(i, j, (won[i, j] + 1 - won[j, i]) / 2 if both else won[i, j]) for i, j in found]
    return np.array(mean_wins(len(won), results), dtype=np.float64)


def fixed_order(size: int) -> list[tuple[int, int]]:
    """All pairs with the lower index first, as the reference asks (M3.8 a)."""
    return [(i, j) for i in range(size) for j in range(i + 1, size)]


def agreement(judge: str, groups: int, seed: int = 0) -> dict[str, tuple[int, float, float]]:
    """For each design: comparisons of a group, correlation of its scores with the full tournament's, and with quality.

    Correlations are means over groups; a group whose scores are all equal counts as 0.
    """
    generator = np.random.default_rng(seed)
    sums = {name: np.zeros(3) for name in DESIGNS}
    for number in range(groups):
        quality = generator.standard_normal(SIZE)
        won = verdicts(quality, *JUDGES[judge], generator)
        reference = scores(pairs(SIZE, "full"), won, both=True)
        for name, (kind, partners, both) in DESIGNS.items():
            found = fixed_order(SIZE) if kind == "fixed" else pairs(SIZE, kind, partners, number)
            given = scores(found, won, both)
            asked = len(found) * (2 if both else 1)
            sums[name] += [asked, correlation(given, reference), correlation(given, quality)]
    return {name: (round(asked / groups), a / groups, b / groups) for name, (asked, a, b) in sums.items()}


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(), right - right.mean()
    norm = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / norm if norm else 0.0


def main() -> int:
    tables = {judge: agreement(judge, 2000) for judge in JUDGES}
    print("| tournament | comparisons | " + " | ".join(JUDGES) + " |")
    print("|" + "---|" * (len(JUDGES) + 2))
    for name in tables["sharp"]:
        cells = [f"{tables[judge][name][1]:.2f} / {tables[judge][name][2]:.2f}" for judge in JUDGES]
        print(f"| {name} | {tables['sharp'][name][0]} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
