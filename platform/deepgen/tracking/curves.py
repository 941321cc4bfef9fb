"""Training curves of a run as one PNG, drawn from its metrics.jsonl."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deepgen.errors import writing
from deepgen.tracking.journal import FILE_NAME, read_series
from deepgen.tracking.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from deepgen.config.settings import Settings

CURVES, REWARDS = "curves.png", "rewards.png"
Series = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Panel:
    """One plot: its title and its metrics (a pattern for the whole name; its group, if any, becomes the label)."""

    title: str
    pattern: str
    log: bool = False  # logarithmic where the values span a wide range
    whole: bool = False  # with lines at 0 and 1


PANELS = (
    Panel("reward (mean of the step's samples)", r"reward/([^/]+)"),
    Panel("reward on held-out prompts", r"eval/([^/]+)"),
    Panel("held-out reward (never trained on)", r"reward_held_out/([^/]+)"),
    Panel("held-out reward on held-out prompts", r"eval_held_out/([^/]+)"),
    Panel("loss", r"loss/([^/]+)"),
    Panel("loss on held-out records", r"heldout_loss/((?!records)[^/]+)"),
    Panel("the same, averaged weights", r"heldout_loss_ema/([^/]+)"),
    Panel("KL to the reference", r"policy/(kl[^/]*)", log=True),
    Panel("share of clipped samples", r"policy/(clip_share)"),
    Panel("gradient norm", r"train/(grad_norm)", log=True),
)
REWARD_PANELS = (
    Panel("change since the first steps, in spreads within a group", r"reward_change/([^/]+)"),
    Panel("which reward moves the policy (share of the advantages)", r"advantage/share/([^/]+)", whole=True),
    Panel("weight, where it is asked", r"reward_weight/([^/]+)", whole=True),
)
_FIRST = 5  # steps that a change starts from, or a fifth of the run
_LOG_RANGE = 20
_STYLES = ("-", "--", ":", "-.")  # of lines, as there are only 10 colours
_INSIDE = 10  # most names that stand in a legend among the lines; more stand below them
_WIDTH, _HEIGHT, _NAME = 5.2, 3.4, 0.17  # inches of a panel, and of a line of names below it
_SMOOTHING_SPAN = 10  # recent steps that carry about 87 % of the weight in the thick line


def record_curves(settings: Settings, stage: str) -> str:
    """Draw the curves of a finished run and attach them to its MLflow run. Returns lines that say where both are."""
    folder = settings.run.folder
    with Tracker(settings, stage, attach=True) as tracker:
        lines = [f"MLflow: {tracker.where()}"]
        if draw_curves(folder / FILE_NAME, folder / CURVES, title=settings.run.name):
            tracker.log_file(folder / CURVES)
            lines.insert(0, f"curves: {folder / CURVES}")
    return "\n".join(lines)


def draw_rewards(metrics: Path, output: Path, *, title: str = "") -> bool:
    """Draw the rewards of a run side by side, whatever their scales, and which of them moves the policy.

    As `draw_curves`.
    """
    return draw_curves(metrics, output, title=title, panels=REWARD_PANELS)


def draw_curves(metrics: Path, output: Path, *, title: str = "", panels: tuple[Panel, ...] = PANELS) -> bool:
    """Draw the panels that have data from `metrics` (metrics.jsonl) into `output` (PNG).

    Thin lines are the values, thick lines their exponential average. Returns False, and writes nothing, if there is
    nothing to draw. Raises UserError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    series = read_series(metrics)
    series |= reward_changes(series)
    chosen = [(panel, found) for panel in panels if (found := _select(series, panel.pattern))]
    if not chosen:
        return False
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    height = _HEIGHT + _NAME * max(_lines_below(found) for _, found in chosen)
    size = _WIDTH * columns, height * rows + (0.4 if title else 0)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    for index, (panel, found) in enumerate(chosen):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), panel, found)
    with writing("the curves", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    return True


def reward_changes(series: Series) -> Series:
    """Curves "reward_change/<name>" of rewards on one scale: the change of the mean since the first steps.

    Its unit is the mean spread of the reward within a group in these steps, so a reward that has none has no curve.
    """
    found: Series = {}
    for name, (steps, values) in series.items():
        reward = name.removeprefix("reward/")
        spreads = series.get(f"reward_spread/{reward}", ([], []))[1]
        first = max(1, min(_FIRST, len(values) // 5))
        if name == reward or not spreads or not (unit := float(np.mean(spreads[:first]))):
            continue
        start = float(np.mean(values[:first]))
        found[f"reward_change/{reward}"] = steps, [(value - start) / unit for value in values]
    return found


def _select(series: Series, pattern: str) -> Series:
    found: Series = {}
    for name, values in series.items():
        match = re.fullmatch(pattern, name)
        if match:
            found[match.group(1) if match.groups() else name] = values
    return found


def _draw_panel(axes: Axes, panel: Panel, found: Series) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (label, (steps, values)) in enumerate(sorted(found.items())):
        colour, style = f"C{index}", _STYLES[index // 10 % len(_STYLES)]
        if len(steps) > _SMOOTHING_SPAN:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, smoothed(values), style, color=colour, linewidth=2, label=label)
        else:
            axes.plot(steps, values, style, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
    if panel.whole:
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.axhline(1, color="0.6", linewidth=0.8)
    every = [value for _, values in found.values() for value in values]
    if panel.log and min(every) > 0 and max(every) > _LOG_RANGE * min(every):
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(found) > _INSIDE:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
        axes.legend(fontsize=8, edgecolor="none", ncols=_names_in_a_line(found), **place)
    elif len(found) > 1:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")  # may lie over lines


def _names_in_a_line(found: Series) -> int:
    """As many as a panel is wide: each with its letters, of about 0.065 inches, and a piece of its line."""
    return max(1, int(_WIDTH / (0.45 + 0.065 * max(map(len, found)))))


def _lines_below(found: Series) -> int:
    """Lines of names below a panel."""
    return -(-len(found) // _names_in_a_line(found)) if len(found) > _INSIDE else 0


def smoothed(values: list[float], span: int = _SMOOTHING_SPAN) -> npt.NDArray[np.float64]:
    """Exponential average with the start-up bias divided out. [n] -> [n]."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        result[index] = total / weight
    return result
