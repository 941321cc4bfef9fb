"""Runs of `stages/rl.py` whose processes are killed at random moments, which must end with the undisturbed run's bits.

A run uses a cluster of two nodes on this machine, the real stages/rl.py, and always the same command with `--resume`,
as a scheduler would repeat it. A killer picks a role and a moment, sends SIGKILL, and waits until the run has moved
before the next one; every other kill comes while the run still recovers. What the learner did at that moment is read
from the run's timeline afterwards.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from actors.learner.console import FILE as CONSOLE
from actors.messages import NIXL, OBJECT_STORE
from deepgen.tracking.timeline import LEARNER, Span, read_spans, unix_now

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "stages" / "rl.py"
STEPS = 10
MOVE_DEADLINE_S = 400.0  # the longest that a run may stand still
TITLES = {  # role -> how Ray titles its processes
    "rollout actor": "ray::RolloutActor",
    "reward replica": "ray::RewardActor",
    "learner rank": "ray::RayTrainWorker",
    "stream": "ray::ExperienceStream",
    "Train controller": "ray::TrainController",
}
JUDGE, NODE, DRAINED, DRIVER = "judge", "node", "drained node", "driver"
ROLES = (*TITLES, JUDGE, NODE, DRAINED, DRIVER)
NOTICE_S = 4.0  # between the word that a node is taken away and its end
KILL_HEADER = "| role | moment | kills | in runs that ended with other bits | that failed |\n" + "|---" * 5 + "|"


@dataclass
class Kill:
    """What was killed, and when (Unix seconds); `phase`: what the learner did then."""

    role: str
    time: float
    phase: str = ""


@dataclass
class Trial:
    """One run and what was done to it."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    problem: str = ""  # why it did not end, or what else went wrong
    same: bool = False


def overrides(folder: Path, name: str, max_staleness: int, *, judge: bool, transport: str = OBJECT_STORE) -> list[str]:
    """Ten short steps on the tiny world. One reward is cheap; with `judge`, vLLM scores too, one image at a time."""
    weights = "{brightness: 0.5, judge: 0.5}" if judge else "{brightness: 1.0}"
    return [
        "--recipe=tiny-rl",
        f"run.dir={folder}",
        f"run.name={name}",
        f"train.steps={STEPS}",
        "train.checkpoint_every=1",
        "train.max_failures=-1",
        "train.threads=1",
        "rollout.group_size=4",
        "rollout.prompts_per_step=3",
        "algorithm.sft_batch=4",
        f"experience.max_staleness={max_staleness}",
        f"experience.transport={transport}",
        "experience.overlap=on",
        "experience.deadline_s=200",
        "evaluation.prompts=0",
        "tracking.grid_every=0",
        "rewards.brightness.class=examples.own_reward.brightness:Brightness",
        "rewards.judge.batch_size=1",
        *(f"rewards.weights.{task}={weights}" for task in ("t2i", "reasoning", "text", "edit")),
    ]


class TwoNodes:
    """A Ray cluster of a head and one more node, both on this machine. The second one can be killed and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ |= {
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # of this cluster only
            "RAY_worker_niceness": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=self._node())
        self._second = self._cluster.add_node(**self._node())
        self.address: str = self._cluster.address

    @staticmethod
    def _node() -> dict[str, Any]:
        return {"num_cpus": 4, "object_store_memory": 300 << 20, "include_dashboard": False}

    def kill_second(self) -> None:
        """SIGKILL for the second node with everything on it; another one takes its place."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(**self._node())

    def drain_second(self) -> None:
        """As a cloud takes a spot node back: a notice, another node meanwhile, then SIGKILL for all that is on it."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason, ends_ms = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), 1000 * (time.time() + NOTICE_S)
        GcsClient(address=self.address).drain_node(self._second.node_id, reason, "taken back", int(ends_ms))
        drained, self._second = self._second, self._cluster.add_node(**self._node())
        time.sleep(NOTICE_S)
        self._cluster.remove_node(drained, allow_graceful=False)

    def close(self) -> None:
        """End both nodes."""
        self._cluster.shutdown()


def processes(role: str) -> list[psutil.Process]:
    """The processes of a role below this one, on all nodes that it has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            title = (process.cmdline() or [""])[0]
            if title.startswith(TITLES.get(role, TITLES["reward replica"])):
                is_judge = role in (JUDGE, "reward replica") and _uses_vllm(process)
                if is_judge == (role == JUDGE):
                    found.append(process)
    return found


def _uses_vllm(process: psutil.Process) -> bool:
    return any("vllm" in mapped.path for mapped in process.memory_maps())


class Runner:
    """Starts one run as often as needed, and knows how far it is."""

    def __init__(self, cluster: TwoNodes, settings: Sequence[str], folder: Path) -> None:
        self._cluster, self._settings, self.folder = cluster, settings, folder
        self._log = folder.with_suffix(".log")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(PROGRAM), *self._settings, "--resume"]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*command, f"cluster.address={self._cluster.address}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )

    def restart(self) -> None:
        """SIGKILL for the driver; the same command again."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = self._start()

    def steps(self) -> int:
        """Optimizer steps that the run has logged; its metrics say it at once."""
        with suppress(FileNotFoundError):
            return len(self.folder.joinpath("metrics.jsonl").read_bytes().splitlines())
        return 0

    def ended(self) -> bool:
        return self.process.poll() is not None

    def failures(self) -> list[str]:
        """Why the learner was restarted where nobody had died: failures of its own, which a kill must not cause."""
        lines = (self.folder / CONSOLE).read_text(errors="replace", encoding="utf-8").splitlines()
        return [line for line in lines if line.startswith("starting the workers again") and "died" not in line]

    def tail(self) -> str:
        """The last lines of the run's output."""
        return "\n".join(self._log.read_text(errors="replace", encoding="utf-8").splitlines()[-30:])

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until something holds or the run ends. Raises TimeoutError if the run stands still."""
        begin, steps = time.monotonic(), self.steps()
        while not until() and not self.ended():
            time.sleep(0.05)
            if self.steps() != steps:
                begin, steps = time.monotonic(), self.steps()
            if time.monotonic() - begin > MOVE_DEADLINE_S:
                raise TimeoutError(f"nothing has moved for {MOVE_DEADLINE_S:.0f} s after step {steps}")


def run_trial(cluster: TwoNodes, runner: Runner, number: int, roles: Iterable[str], within_s: float = 2.5) -> Trial:
    """Let a run go to its end and kill these roles in turn, as long as it goes on.

    number: seed of the moments. within_s: a kill comes at most so long after a step has ended.
    """
    trial, chance = Trial(number), random.Random(number)
    try:
        runner.wait(lambda: runner.steps() > 0)
        for role in roles:
            if chance.random() < 0.5 and trial.kills:  # while it recovers from the one before
                time.sleep(chance.uniform(0.0, 4.0))
            else:
                done = runner.steps()
                runner.wait(lambda done=done: runner.steps() > done)  # type: ignore[misc]
                time.sleep(chance.uniform(0.0, within_s))
            if runner.ended():
                break
            _kill(cluster, runner, chance, role, trial)
        runner.wait(runner.ended)
    except TimeoutError as error:
        trial.problem = str(error)
        os.killpg(runner.process.pid, signal.SIGKILL)
    if not trial.problem and runner.process.returncode:
        trial.problem = f"exit code {runner.process.returncode}"
    if not trial.problem and (failures := runner.failures()):
        trial.problem = "; ".join(failures)
    if trial.problem:
        print(f"trial {number}: {trial.problem}\n{runner.tail()}", flush=True)
    spans = [span for span in read_spans(runner.folder) if span.role == LEARNER]
    for kill in trial.kills:
        kill.phase = phase_at(spans, kill.time)
    return trial


def _kill(cluster: TwoNodes, runner: Runner, chance: random.Random, role: str, trial: Trial) -> None:
    if role not in (NODE, DRAINED, DRIVER):
        runner.wait(lambda: bool(processes(role)))  # it may be starting again
    kill = Kill(role, unix_now())
    if role == NODE:
        cluster.kill_second()
    elif role == DRAINED:
        cluster.drain_second()
    elif role == DRIVER:
        runner.restart()
    elif running := processes(role):
        with suppress(psutil.NoSuchProcess):
            chance.choice(running).kill()
    trial.kills.append(kill)


def phase_at(spans: Sequence[Span], moment: float) -> str:
    """What the learner did at a moment; "starting" between two lives of it."""
    inside = [span for span in spans if span.begin <= moment <= span.end]
    return min(inside, key=lambda span: span.end - span.begin).what if inside else "starting"


def result(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The bits that a run has ended with: its weights, and every step's loss and rewards."""
    weights = (folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    steps: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kept = {k: v for k, v in entry["metrics"].items() if k.startswith(("loss/", "reward/", "policy/"))}
        steps[entry["step"]] = steps.get(entry["step"], {}) | kept
    return weights, [steps[step] for step in sorted(steps)]


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """A cluster for as long as the context lasts."""
    cluster = TwoNodes()
    try:
        yield cluster
    finally:
        cluster.close()


def undisturbed(cluster: TwoNodes, settings: Sequence[str], folder: Path) -> Any:
    """The `result` of a run that nobody disturbs."""
    runner = Runner(cluster, settings, folder)
    runner.wait(runner.ended)
    if runner.process.returncode:
        raise RuntimeError(f"the undisturbed run failed:\n{runner.tail()}")
    return result(folder)


def run_kills(folder: Path, count: int, per_run: int, *, roles: Sequence[str] = ROLES) -> list[Trial]:
    """Trials until `count` processes have been killed: on-policy and one version behind, with and without the judge.

    In every third one weights travel by NIXL, which must make no difference.
    """
    trials: list[Trial] = []
    expected: dict[tuple[int, bool], Any] = {}
    with two_nodes() as cluster:
        while sum(len(trial.kills) for trial in trials) < count:
            number = len(trials)
            staleness, judge = number % 2, number % 4 >= 2 and JUDGE in roles
            possible = [role for role in roles if judge or role != JUDGE]
            if (staleness, judge) not in expected:
                calm = folder / f"calm-{staleness}-{judge}"
                expected[staleness, judge] = undisturbed(
                    cluster, overrides(folder, calm.name, staleness, judge=judge), calm
                )
            run = folder / f"trial-{number}"
            transport = NIXL if number % 3 == 2 else OBJECT_STORE
            settings = overrides(folder, run.name, staleness, judge=judge, transport=transport)
            runner = Runner(cluster, settings, run)
            trial = run_trial(cluster, runner, number, random.Random(f"roles {number}").choices(possible, k=per_run))
            trial.same = not trial.problem and result(run) == expected[staleness, judge]
            trials.append(trial)
            outcome = trial.problem or ("same bits" if trial.same else "OTHER BITS")
            done = ", ".join(f"{kill.role} ({kill.phase})" for kill in trial.kills)
            with_judge = ", judge" if judge else ""
            print(f"trial {number}, max_staleness {staleness}, {transport}{with_judge}: {outcome}; {done}", flush=True)
    return trials


def kill_rows(trials: Sequence[Trial]) -> list[str]:
    """The lines of the table: kills by role and moment, and how many of them were in runs that did not end well."""
    kills = Counter[tuple[str, str]]()
    other, unfinished = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for trial in trials:
        for kill in trial.kills:
            key = kill.role, kill.phase
            kills[key] += 1
            unfinished[key] += bool(trial.problem)
            other[key] += not trial.problem and not trial.same
    return [
        f"| {role} | {phase} | {kills[role, phase]} | {other[role, phase]} | {unfinished[role, phase]} |"
        for role, phase in sorted(kills)
    ]
