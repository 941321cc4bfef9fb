"""Whether `stages/rl.py --simulate` is right: the predicted seconds of a step against those of small runs on Ray.

Everything between the roles is real, as in a run: stream, fleet, turns, reward pool, Ray's calls, the learner's source
and its publisher. Drawing a group, a call of the reward and the update of a group sleep, so that two cores do not
decide. One run with settings of its own is the calibration: its timeline gives the phase times (`from=RUN`), with all
that Ray adds to them. Then the runs in RUNS are predicted and run.

"ours" is the mean measured step and "floor" the predicted one: the ratio should lie within 10 % of 1. The first steps,
which fill the pipeline, are left out of both.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
import torch

from actors.experience.rollout_fleet import WEIGHTS_GROUP
from actors.learner.protocols import Arriving
from actors.objectives.experience_source import ExperienceSource
from actors.simulation.simulated_run import WARM_UP, simulate
from actors.start import Rollouts, start_stream
from benchmarks.control_plane import own_ray
from benchmarks.overlap import IMAGES, SleepingActor
from deepgen.config import Settings
from deepgen.config.settings import TASKS
from deepgen.planning.scale.estimates import Machine, estimate
from deepgen.planning.scale.phases import PhaseFigures
from deepgen.planning.scale.run_phases import measured_phases
from deepgen.planning.scale.splits import Split
from deepgen.tracking.progress import Phases as Clock
from deepgen.tracking.timeline import LEARNER, Recorder, Span

if TYPE_CHECKING:
    from benchmarks.timing import Result  # late everywhere: the actors here need no torch

SAMPLE_S, CALL_S, UPDATE_S, STEP_S = 0.5, 0.15, 0.1, 0.2  # of a group, a call of the reward, a group, and a step
GROUPS = 8
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Run:
    """actors, replicas: how many of each. overlap: whether an on-policy learner takes groups one by one."""

    name: str
    actors: int
    replicas: int
    max_staleness: int
    overlap: str = "off"

    def split(self) -> Split:
        return Split(1, self.actors, {"sleeping": self.replicas})


CALIBRATION = Run("calibration", actors=2, replicas=1, max_staleness=0, overlap="auto")
RUNS = (
    Run("on-policy, 1 actor", 1, 1, 0),
    Run("on-policy, 3 actors, group by group", 3, 1, 0, "auto"),
    Run("1 version behind, 2 actors", 2, 1, 1),
    Run("1 version behind, 4 actors, 2 replicas", 4, 2, 1),
)


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """One result for each of RUNS, with `repeats` measured steps. Starts a local Ray."""
    with tempfile.TemporaryDirectory() as folder, own_ray(num_cpus=4):
        return compare_runs(weights, Path(folder), RUNS, repeats)


def compare_runs(weights: Path, folder: Path, runs: tuple[Run, ...], repeats: int) -> list[Result]:
    """Calibrate, predict and run, on the Ray that there is. folder: for the runs."""
    from benchmarks.timing import Result

    calibration = make_settings(weights, folder, CALIBRATION, repeats)
    train(calibration, CALIBRATION)
    figures = measured_phases(calibration.run.folder)
    results = []
    for chosen in runs:
        settings = make_settings(weights, folder, chosen, repeats)
        predicted = predicted_step(settings, chosen, figures)
        measured = train(settings, chosen)[-repeats:]
        mean = sum(measured) / len(measured)  # steps may differ in turns
        text = f"{GROUPS} groups: step {mean:.2f} s, predicted {predicted:.2f} s"
        results.append(Result(f"simulation, {chosen.name}", text, 1, (mean,) * 2, (predicted,) * 2))
    return results


def predicted_step(settings: Settings, chosen: Run, figures: PhaseFigures) -> float:
    """Seconds of a step by the simulation. What the calibration does not tell does not happen in these runs."""
    known = estimate(settings, Machine(), 1).replaced(figures.numbers, figures.scores)
    phases = replace(known.phases(), control_s=0.0)  # it is in the measured times
    return simulate(settings, chosen.split(), phases, ["t2i"], steps=WARM_UP + chosen.max_staleness + 6).step_s


def make_settings(weights: Path, folder: Path, chosen: Run, repeats: int) -> Settings:
    """The settings of a run."""
    from benchmarks.timing import recipe

    return recipe(
        "tiny-rl",
        weights,
        f"run.dir={folder}",
        f"run.name={chosen.name.replace(' ', '-').replace(',', '')}",
        f"train.steps={WARM_UP + chosen.max_staleness + repeats}",
        f"rollout.prompts_per_step={GROUPS}",
        f"rollout.group_size={IMAGES}",
        f"rollout.actors={chosen.actors}",
        "algorithm.kl=none",
        f"experience.max_staleness={chosen.max_staleness}",
        f"experience.overlap={chosen.overlap}",
        f"experience.deadline_s={DEADLINE_S}",
        "rewards.sleeping.class=benchmarks.control_plane:SleepingReward",
        f"rewards.sleeping.batch_s={CALL_S}",
        f"rewards.sleeping.replicas={chosen.replicas}",
        *(f"rewards.weights.{task}={{sleeping: 1.0}}" for task in TASKS),
    )


def train(settings: Settings, chosen: Run) -> list[float]:
    """Seconds of each step of a learner that sleeps; it writes its timeline as a real one does."""
    remote = ray.remote(num_cpus=0.1, concurrency_groups={WEIGHTS_GROUP: 1})(SleepingActor)
    in_ray = {f"rollout-{i}": f"{settings.run.name}-{i}" for i in range(chosen.actors)}
    handles = {name: remote.options(name=named).remote(SAMPLE_S) for name, named in in_ray.items()}
    stream = start_stream(settings, Rollouts(handles, in_ray), resume=False, gpus=False)
    ray.get(stream.start.remote(), timeout=DEADLINE_S)
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, say=print, device=torch.device("cpu"))
    policy: Any = SimpleNamespace(weights=lambda: {"w": torch.zeros(8)}, run=lambda compute, *arguments: 0.0)
    source, seconds = ExperienceSource(context, stream, None), list[float]()
    source.publish(policy, 0)
    ray.get(stream.begin.remote(), timeout=DEADLINE_S)
    recorder, learner = Recorder(settings.run.folder, f"{LEARNER}-0"), f"{LEARNER} 0"
    for step in range(settings.train.steps):

        def ended(phase: str, begin: float, end: float, of: int = step) -> None:
            recorder.add(Span(learner, LEARNER, phase, begin, end, step=of))

        begin = time.monotonic()
        _step(source, policy, step, Clock(clock=recorder.clock, ended=ended))
        seconds.append(time.monotonic() - begin)
    recorder.flush()
    source.close()
    ray.get(stream.stop.remote(), timeout=DEADLINE_S)
    for actor in (stream, *handles.values()):
        ray.kill(actor)
    return seconds


def _step(source: ExperienceSource, policy: Any, step: int, clock: Clock) -> None:
    """One step, in the order of `TrainingLoop.run_step`."""
    with clock("wait"):
        batch = source.next(step, 0, 1)
    with clock("update"):
        if isinstance(batch, Arriving):
            pieces, end = iter(batch.pieces), object()
            while True:
                with clock("wait"):
                    piece: Any = next(pieces, end)
                if piece is end:
                    break
                time.sleep(UPDATE_S * len(piece.groups))
        else:
            time.sleep(UPDATE_S * len(batch.groups))
        time.sleep(STEP_S)
    with clock("publish"):
        source.publish(policy, step + 1)
