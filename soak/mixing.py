"""GDPO against a sum of raw rewards: two rewards at weights 2:1, of which one has a scale a hundred times wider.

Each run is `stages/rl.py` on the tiny world. The rewards are `aesthetic` (0..1, weight 2) and `light`, which is the
brightness of a picture times 100 (weight 1). With `gdpo` the weights decide, with `grpo` the scale does
(`deepgen.algorithms.advantages`). docs/reward-mixing.md shows what comes out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepgen.tracking.journal import FILE_NAME, read_series
from deepgen.tracking.paired_table import Table, load_table
from rewards import PoolSettings, RewardRequest, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
METHODS, SEEDS = ("gdpo", "grpo"), (42, 1, 7)
REWARDS = {"aesthetic": 2.0, "light": 1.0}  # and their weights
SCALE = 100.0
LABELS = {
    "gdpo": "gdpo: each reward normalised in its group",
    "grpo": "grpo: raw rewards added up",
}
RUN_DEADLINE_S = 1800.0
MIXING_HEADER = "| method | seed | reward | share of the signal | before | change (95 %) |\n" + "|---" * 6 + "|"


class WideBrightness:
    """The mean brightness of an image times a factor: a reward whose scale says nothing about its importance."""

    class Options(PoolSettings):
        scale: float = setting(SCALE, "Score of a white image; a black one gets 0.", gt=0)

    def __init__(self, options: Options) -> None:
        self._scale = options.scale

    def score(self, requests: Sequence[RewardRequest]) -> list[float]:
        """Scores from 0 to `scale`."""
        return [self._scale * float(request.image.mean()) / 255 for request in requests]


@dataclass(frozen=True)
class MixedRun:
    """One finished run: its series by metric as (steps, values), and its table of held-out prompts by reward."""

    method: str
    seed: int
    series: dict[str, tuple[list[int], list[float]]]
    heldout: Table

    def share(self, reward: str) -> float:
        """Mean share of the advantages that comes from a reward."""
        return float(np.mean(self.series[f"advantage/share/{reward}"][1]))


def overrides(folder: Path, method: str, seed: int) -> list[str]:
    """Settings of one run: 18 steps of 12 groups of 8."""
    weights = ", ".join(f"{name}: {weight}" for name, weight in REWARDS.items())
    return [
        f"run.dir={folder}",
        f"run.name={run_name(method, seed)}",
        f"run.seed={seed}",
        "train.steps=18",
        "train.threads=1",
        "train.learning_rate=1e-4",
        "train.checkpoint_every=1000",
        "rollout.prompts_per_step=12",
        f"algorithm.advantage={method}",
        "algorithm.kl=none",
        "algorithm.sft_coef=0",
        "evaluation.prompts=64",
        "tracking.grid_every=0",
        "rewards.light.class=soak.mixing:WideBrightness",
        *(f"rewards.weights.{task}={{{weights}}}" for task in ("t2i", "reasoning", "text", "edit")),
    ]


def run_name(method: str, seed: int) -> str:
    """Name and folder of a run."""
    return f"mixing-{method}-{seed}"


def run_mixing(folder: Path, seeds: Sequence[int] = SEEDS) -> Iterator[MixedRun]:
    """The runs, one after the other; those that have ended in `folder` are read.

    Both methods start with a seed before the next one does, so that an unfinished study can be compared. Raises
    CalledProcessError if a run fails; its output is in `folder`.
    """
    for seed in seeds:
        for method in METHODS:
            where = folder / run_name(method, seed)
            if not (where / "report.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, str(ROOT / "stages" / "rl.py"), *overrides(folder, method, seed)]
                with (folder / f"{where.name}.log").open("w") as log:
                    subprocess.run(
                        command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=RUN_DEADLINE_S
                    )
            yield read_run(where, method, seed)


def read_run(where: Path, method: str, seed: int) -> MixedRun:
    """A finished run from its folder."""
    return MixedRun(method, seed, read_series(where / FILE_NAME), load_table(where / "report.json"))


def mixing_rows(run: MixedRun) -> list[str]:
    """A line of the table for each reward of a run."""
    rows = {row.name: row for row in run.heldout.rows}
    found = []
    for name in REWARDS:
        row = rows[name]
        change = f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
        cells = [run.method, run.seed, name, f"{run.share(name):.1%}", f"{row.before:.3f}", change]
        found.append("| " + " | ".join(map(str, cells)) + " |")
    return found


def draw_mixing(runs: Sequence[MixedRun], output: Path) -> None:
    """Draw what decides in each run, how the methods drift apart, and the held-out changes (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(REWARDS)
    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"weights {' : '.join(f'{REWARDS[name]:g} {name}' for name in names)}", fontsize=12)
    top, bottom = figure.subplots(2, 3)
    _draw_shares(top[0], runs, names[0])
    for axes, name in zip(top[1:], names, strict=True):
        _draw_gap(axes, runs, name)
    for axes, name in zip(bottom[1:], names, strict=True):
        _draw_changes(axes, runs, name)
    bottom[0].axis("off")
    bottom[0].legend(*top[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=11)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def draw_samples(folder: Path, seed: int, output: Path, count: int = 10) -> None:
    """Draw the same held-out prompts before and after the runs of a seed, one picture each (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stages.rl_report import AFTER, BEFORE  # late: replicas of the reward import this file

    rows = [("before", METHODS[0], BEFORE), *((method, method, AFTER) for method in METHODS)]
    figure = Figure(figsize=(1.05 * count, 3.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), count)
    for line, (title, method, file) in zip(grid, rows, strict=True):
        with np.load(folder / run_name(method, seed) / file, allow_pickle=False) as saved:
            for number, axes in enumerate(line):
                axes.imshow(saved[f"image/{number}"][0])
                axes.set_xticks([])
                axes.set_yticks([])
        line[0].set_ylabel(title)
    figure.savefig(output)


def _draw_shares(axes: Axes, runs: Sequence[MixedRun], name: str) -> None:
    for number, method in enumerate(METHODS):
        curves = [run.series[f"advantage/share/{name}"] for run in runs if run.method == method]
        for steps, values in curves:
            axes.plot(steps, values, color=f"C{number}", alpha=0.35, linewidth=1)
        mean = np.mean([values for _, values in curves], axis=0)
        axes.plot(curves[0][0], mean, color=f"C{number}", linewidth=2.2, label=LABELS[method])
    for whole in (0, 1):
        axes.axhline(whole, color="0.5", linewidth=0.8)
    _finish(axes, f"share of the advantages that is {name}'s", "step")


def _draw_gap(axes: Axes, runs: Sequence[MixedRun], name: str) -> None:
    """Differences in the step's mean between the runs of a seed, which draw the same prompts in every step."""
    first, second = METHODS
    by_run = {(run.method, run.seed): run.series[f"reward/{name}"] for run in runs}
    gaps = []
    for (method, seed), (steps, values) in by_run.items():
        if method == first and (second, seed) in by_run:
            gaps.append(np.subtract(by_run[second, seed][1], values))
            axes.plot(steps, gaps[-1], color="0.3", alpha=0.4, linewidth=1)
    if gaps:
        axes.plot(steps, np.mean(gaps, axis=0), color="0.1", linewidth=2.2)
    axes.axhline(0, color="0.5", linewidth=0.8)
    _finish(axes, f"{name} in training: {second} minus {first}, same prompts", "step")


def _draw_changes(axes: Axes, runs: Sequence[MixedRun], name: str) -> None:
    order = sorted(runs, key=lambda run: METHODS.index(run.method))
    for place, run in enumerate(order):
        row = next(row for row in run.heldout.rows if row.name == name)
        bars = [[row.difference - row.low], [row.high - row.difference]]
        axes.errorbar(place, row.difference, bars, fmt="o", color=f"C{METHODS.index(run.method)}", capsize=4)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xticks(range(len(order)), [f"{run.method}\n{run.seed}" for run in order], fontsize=8)
    _finish(axes, f"{name}: change on held-out prompts, 95 %", "method, seed")


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
