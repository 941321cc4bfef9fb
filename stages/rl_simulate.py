"""`stages/rl.py --simulate "GPUs=64..4096 ..."`: what a run would do on so many GPUs. Starts no Ray, loads no weights.

docs/scale.md explains the terms and the text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepgen.config import Settings
from deepgen.config.schema.sections import TASKS
from deepgen.config.stage_rules import check_stage
from deepgen.errors import UserError, nearest
from deepgen.planning import memory
from deepgen.planning.plan import make_job
from deepgen.planning.scale.effective_time import longest_restart
from deepgen.planning.scale.estimates import Machine, estimate
from deepgen.planning.scale.phases import (
    GIVEN,
    MEANINGS,
    NUMBERS,
    CallTime,
    Figure,
    PhaseFigures,
    ScoreFigure,
)
from deepgen.planning.scale.run_phases import measured_phases
from stages.rl_status import run_folder

GOAL = 0.95  # of the effective training time
MOST_GPUS = 1 << 16
# Terms with a number: the least that is allowed, the most, and what they mean.
LIMITS: dict[str, tuple[float, float]] = {
    "tflops": (1e-3, 1e6),
    "utilisation": (1e-3, 1.0),
    "link_gb_s": (1e-3, 1e6),
    "gpu_gib": (1, 1e5),
    "gpu_hour": (0, 1e6),
    "node_gpus": (1, 1024),
    "failures": (0, 10),
    "groups_per_gpu": (1e-6, 1e4),
    **dict.fromkeys(NUMBERS, (0.0, 1e6)),
}
WHOLE = ("node_gpus", "gpu_gib")
OTHERS = ("GPUs", "from", "score_s", "tasks")
EXAMPLE = '"GPUs=64..4096 sample_s=2.1 score_s=judge:0.3 gpu_hour=2.5"'


@dataclass(frozen=True)
class Terms:
    """What the argument says. numbers: of LIMITS, as far as given; scores: by pool; tasks: weight of each."""

    gpus: tuple[int, ...]
    run: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, CallTime] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)

    def number(self, name: str, default: float) -> float:
        return self.numbers.get(name, default)


def show_scale(settings: Settings, value: str) -> None:
    """Print the prediction."""
    for line in scale_lines(settings, value, _progress):
        print(line, flush=True)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- The argument ----


def parse_terms(text: str, settings: Settings) -> Terms:
    """The terms of --simulate. Raises UserError for one that is unknown, wrong, or missing."""
    found: dict[str, Any] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in (*OTHERS, *LIMITS):
            raise UserError(
                f"--simulate: unknown term {name!r}{nearest(name, [*OTHERS, *LIMITS])}; allowed: as in {EXAMPLE}, "
                f"of {', '.join((*OTHERS, *LIMITS))}"
            )
        if not equals or not value:
            raise UserError(f"--simulate: {name}: got no value; allowed: {name}=VALUE, as in {EXAMPLE}")
        if name in found:
            raise UserError(f"--simulate: {name}: given twice; allowed: once")
        found[name] = value
    if "GPUs" not in found:
        raise UserError(f"--simulate: got no GPUs; allowed: as in {EXAMPLE}")
    used = settings.rewards.used()
    return Terms(
        gpus=_gpus(found["GPUs"]),
        run=found.get("from", ""),
        numbers={name: _number(name, value) for name, value in found.items() if name in LIMITS},
        scores={name: _call_time(name, value) for name, value in _pairs("score_s", found, used).items()},
        tasks={name: _number(f"tasks={name}", value) for name, value in _pairs("tasks", found, TASKS).items()},
    )


def _gpus(text: str) -> tuple[int, ...]:
    """The counts: one, or the ends of a range and the powers of two between them."""
    first, dots, last = text.partition("..")
    ends = [first, last] if dots else [first]
    if not all(end.isascii() and end.isdigit() and 1 <= int(end) <= MOST_GPUS for end in ends):
        raise UserError(f"--simulate: GPUs: got {text!r}; allowed: 1 to {MOST_GPUS}, or a range as in 64..4096")
    low, high = int(ends[0]), int(ends[-1])
    if low > high:
        raise UserError(f"--simulate: GPUs: got {text!r}; allowed: a range from the smaller to the larger")
    powers = (1 << bit for bit in range(MOST_GPUS.bit_length()))
    return tuple(sorted({low, *(power for power in powers if low < power < high), high}))


def _number(name: str, text: str) -> float:
    low, high = LIMITS.get(name, (0.0, 1e6))
    value = _float(text)
    whole = name in WHOLE
    if value is None or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"--simulate: {name}: got {text!r}; allowed: {kind} from {low:g} to {high:g}")
    return value


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _pairs(term: str, found: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The values of a term like score_s=judge:0.3,clip:0.01, by name."""
    pairs: dict[str, str] = {}
    for part in found[term].split(",") if term in found else ():
        name, colon, value = part.partition(":")
        if not colon or name not in names:
            raise UserError(f"--simulate: {term}: got {part!r}; allowed: NAME:NUMBER, with {', '.join(names)}")
        pairs[name] = value
    return pairs


def _call_time(name: str, text: str) -> CallTime:
    """Of "0.3", seconds an image, or of "2+0.3", seconds a call and an image."""
    call, plus, image = text.rpartition("+")
    return CallTime(_number(f"score_s={name}", call) if plus else 0.0, _number(f"score_s={name}", image))


# ---- The figures that it rests on ----


def phase_figures(settings: Settings, terms: Terms) -> PhaseFigures:
    """The phases: those given, those measured in a run, and estimates for the rest."""
    machine = Machine(
        **{name: terms.numbers[name] for name in ("tflops", "utilisation", "link_gb_s") if name in terms.numbers}
    )
    figures = estimate(settings, machine, settings.train.workers)
    if terms.run:
        run = measured_phases(run_folder(settings, terms.run, "--simulate: from"))
        used = {name: figure for name, figure in run.scores.items() if name in figures.scores}
        figures = figures.replaced(run.numbers, used)
    given = {name: Figure(value, GIVEN) for name, value in terms.numbers.items() if name in NUMBERS}
    return figures.replaced(given, {name: ScoreFigure(value, GIVEN) for name, value in terms.scores.items()})


def _tasks(settings: Settings, weights: Mapping[str, float]) -> list[str]:
    """Tasks of prompts in turn: as often as they are weighted; without weights, all that have a reward."""
    rewarded = [task for task in TASKS if any(task in settings.rewards.tasks_of(n) for n in settings.rewards.used())]
    chosen = {task: weight for task, weight in weights.items() if weight} or dict.fromkeys(rewarded, 1.0)
    if strange := [task for task in chosen if task not in rewarded]:
        raise UserError(f"--simulate: tasks: {strange[0]} has no reward; allowed: {', '.join(rewarded)}")
    total, tasks = sum(chosen.values()), list[str]()
    for number in range(1, 101):
        behind = {task: number * weight / total - tasks.count(task) for task, weight in chosen.items()}
        tasks.append(max(behind, key=lambda task: behind[task]))
    return tasks if weights else rewarded


def _fits(settings: Settings, gpu_gib: int) -> Callable[[int], bool]:
    """Whether a learner of so many workers fits GPUs of this size, as --plan counts."""
    job = make_job(settings, "rl")
    return lambda workers: replace(job, workers=workers).total() <= memory.usable(gpu_gib)


# ---- The text ----


def scale_lines(settings: Settings, value: str, say: Callable[[str], None]) -> Iterator[str]:
    """The whole answer, line by line. `say`: gets a line when work begins that takes long."""
    from actors.simulation.scaling import Cluster, Prediction, Scaling  # late: --help needs no Ray

    terms = parse_terms(value, settings)
    figures, tasks = phase_figures(settings, terms), _tasks(settings, terms.tasks)
    cluster = Cluster(int(terms.number("node_gpus", 8)), terms.number("failures", 0.1))
    fits = _fits(settings, int(terms.number("gpu_gib", 80)))
    scaling = Scaling(figures.phases(), tasks, cluster, fits, say)
    yield from _head(settings, terms, figures, tasks, cluster.node_gpus)
    names = settings.rewards.used()
    yield _header(names)
    best: list[Prediction] = []
    for gpus in terms.gpus:
        found = []
        for staleness in sorted({0, 1, settings.experience.max_staleness}):
            changed = _changed(settings, terms, gpus, staleness)
            found.append(scaling.predict(changed, gpus))
            yield _row(found[-1], terms, names)
        best.append(min(found, key=lambda prediction: prediction.hours))
    yield ""
    yield "to set, for the shorter run of each number of GPUs"
    for prediction in best:
        yield f"  {prediction.gpus:>5}  {_to_set(prediction, settings)}"
    yield ""
    yield from _notes(best, settings, figures, terms)


def _changed(settings: Settings, terms: Terms, gpus: int, staleness: int) -> Settings:
    """The settings for so many GPUs."""
    experience = settings.experience.model_copy(update={"max_staleness": staleness})
    rollout = settings.rollout
    if "groups_per_gpu" in terms.numbers:
        groups = max(1, round(terms.numbers["groups_per_gpu"] * gpus))
        rollout = rollout.model_copy(update={"prompts_per_step": groups})
    train = settings.train.model_copy(update={"workers": 1})
    changed = settings.model_copy(update={"experience": experience, "rollout": rollout, "train": train})
    check_stage(changed, "rl")
    return changed


def _head(settings: Settings, terms: Terms, figures: PhaseFigures, tasks: Sequence[str], node: int) -> Iterator[str]:
    rollout, share = settings.rollout, terms.number("failures", 0.1)
    groups = (
        f"{terms.numbers['groups_per_gpu']:g} groups a GPU"
        if "groups_per_gpu" in terms.numbers
        else f"{rollout.prompts_per_step} groups"
    )
    yield f"{settings.run.name}: {settings.train.steps} steps of {groups}, {rollout.group_size} images each"
    yield f"nodes of {node} GPUs, of which {share:.0%} die a day; prompts: {', '.join(sorted(set(tasks)))}"
    yield ""
    yield "seconds of"
    for name in MEANINGS:
        if name == "score_s":
            for pool, score in figures.scores.items():
                text = f"{score.value.call_s:g} + {score.value.image_s:.4g}"
                yield _figure(f"score_s={pool}", text, score.source, score.why or MEANINGS[name])
            continue
        figure = figures.numbers[name]
        more = f"; {figure.why}" if figure.why else ""
        yield _figure(name, f"{figure.value:.4g}", figure.source, MEANINGS[name] + more)
    yield ""


def _figure(name: str, value: str, source: str, why: str) -> str:
    return f"  {name:<20} {value:>11}  {source:<9}  {why}"


def _header(names: Sequence[str]) -> str:
    processes = "".join(f"{name[:14]:>15}" for name in ("learner", "rollout", *names))
    columns = f"{'GPUs':>5} {'used':>5} {'staleness':>9} {'step s':>8} {'images/s':>9} {'ETTR':>6}"
    return f"{columns} {'hours':>8} {'GPU hours':>10} {'cost':>10}{processes}  processes (idle)"


def _row(found: Any, terms: Terms, names: Sequence[str]) -> str:
    gpu_hours = found.used * found.hours
    price = terms.numbers.get("gpu_hour")
    cost = f"{gpu_hours * price:,.0f}" if price is not None else "-"
    processes = {"learner": found.split.workers, "rollout": found.split.actors, **found.split.replicas}
    idle = "".join(
        f"{f'{processes[name]} ({found.outcome.idle[name]:.0%})':>15}" for name in ("learner", "rollout", *names)
    )
    staleness = found.settings.experience.max_staleness
    return (
        f"{found.gpus:>5} {found.used:>5} {staleness:>9} {found.outcome.step_s:>8.2f} {found.images_s:>9.1f} "
        f"{found.ettr:>6.3f} {found.hours:>8.1f} {gpu_hours:>10,.0f} {cost:>10}{idle}"
    )


def _to_set(found: Any, settings: Settings) -> str:
    values = {
        "train.workers": found.split.workers,
        "rollout.actors": found.split.actors,
        **{f"rewards.{name}.replicas": count for name, count in found.split.replicas.items()},
        "experience.max_staleness": found.settings.experience.max_staleness,
        "train.checkpoint_every": found.every,
    }
    if found.settings.rollout.prompts_per_step != settings.rollout.prompts_per_step:
        values["rollout.prompts_per_step"] = found.settings.rollout.prompts_per_step
    return " ".join(f"{key}={value}" for key, value in values.items())


def _notes(best: Sequence[Any], settings: Settings, figures: PhaseFigures, terms: Terms) -> Iterator[str]:
    yield "ETTR: steps x their time without failures and checkpoints / the whole time (docs/scale.md)."
    yield "train.checkpoint_every: Young's sqrt(2 x checkpoint_s x mean life of the learner) / step, at least write_s."
    for found in best:
        if found.ettr < GOAL:
            longest = longest_restart(found.losses, found.every, GOAL)
            way = (
                f"restart_s={longest:.0f} would reach it" if longest >= 1 else "only nodes that live longer would help"
            )
            yield f"{found.gpus} GPUs: ETTR is below {GOAL}; {way}"
    largest = best[-1]
    if largest.used < 0.9 * largest.gpus and "groups_per_gpu" not in terms.numbers:
        yield (
            f"{largest.gpus} GPUs: {largest.used} have work, as a step has {settings.rollout.prompts_per_step} groups; "
            "more groups: rollout.prompts_per_step, or groups_per_gpu=0.5 in --simulate"
        )
    yield from _deadlines(best, settings, figures)
    yield "not in it: evaluations, a run's start, groups that take longer than others, the network between nodes."


def _deadlines(best: Sequence[Any], settings: Settings, figures: PhaseFigures) -> Iterator[str]:
    """Deadlines of the recipe that are shorter than what they wait for."""
    from actors.experience.rollout_fleet import ATTEMPTS

    limit, step_s = settings.experience.deadline_s, max(found.outcome.step_s for found in best)
    needed = max(step_s, ATTEMPTS * figures.numbers["sample_s"].value)
    if needed > limit:
        yield f"experience.deadline_s={math.ceil(2 * needed)}: the recipe's {limit:g} s is too short"
    for name, score in figures.scores.items():
        pool = settings.rewards.pools[name]
        call_s = score.value.of(pool.batch_size)
        if call_s > pool.deadline_s:
            text = f"{pool.dotted('deadline_s')}={math.ceil(2 * call_s)}, or a smaller {pool.dotted('batch_size')}: "
            yield f"{text}{pool.batch_size} images take {call_s:.0f} s, the recipe allows {pool.deadline_s:g}"
