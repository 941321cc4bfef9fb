"""A run of `stages/rl.py` whose scorers fail in every way, one of them for good: it ends, and all scores are counted.

`tests/experience/scoring/test_faulty_service.py` is the short form, of a pool alone.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from rewards.judging.questions import Answer
from tests.helpers.chat_server import question_of, reply_of
from tests.helpers.fault_server import FAULTS, FaultServer, fault_server
from tests.helpers.rl_world import make_world, overrides
from tests.rewards.remote.test_client import brightness

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STEPS, IMAGES = 12, 8  # of a step
DEADLINE_S, TIMEOUT_S, SLACK_S, WAIT_S = 4.0, 2.5, 60.0, 600.0
TOKEN = "t0p-s3cret-of-the-faulty-service"
REWARDS = ("far", "judge", "dead", "near")


def chat(path: str, body: bytes) -> Any:
    """A judge that says Yes with the probability of the image's brightness."""
    (image,) = question_of(json.loads(body)).images
    light = min(max(float(image.mean()) / 255, 1e-6), 1 - 1e-6)
    return reply_of(Answer("Yes", (("Yes", math.log(light)), ("No", math.log(1 - light)))))


class Watched:
    """A run in a process of its own, and the lines that it has said, with the time of each."""

    def __init__(self, world: Path, *more: str) -> None:
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "rl_driver.py"), *overrides(world, *more)]
        environment = os.environ | {"FAULTY_TOKEN": TOKEN}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=world,
            env=environment,
            start_new_session=True,
        )
        self.lines = list[tuple[float, str]]()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def said(self, text: str, *, since: float = 0.0) -> float:
        """When a line with this text came, after waiting for it."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for when, line in list(self.lines):
                if text in line and when > since:
                    return when
            assert self.process.poll() is None, self.output[-4000:]
            time.sleep(0.05)
        raise AssertionError(f"not said within {WAIT_S} s: {text}\n{self.output[-4000:]}")

    def reached(self, folder: Path, step: int) -> None:
        """Wait until this step is over."""
        deadline = time.monotonic() + WAIT_S
        while step not in logged(folder):
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, f"step {step}\n{self.output[-4000:]}"
            time.sleep(0.05)

    def finish(self) -> None:
        assert self.process.wait(WAIT_S) == 0, self.output[-4000:]
        self._reader.join()


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics of the run's own record, by step."""
    file, steps = folder / "metrics.jsonl", dict[int, dict[str, float]]()
    for line in file.read_text().splitlines() if file.exists() else []:
        entry = json.loads(line)
        steps.setdefault(entry["step"], {}).update(entry["metrics"])
    return {step: found for step, found in steps.items() if "reward/total" in found}


def tracked(database: Path) -> dict[int, dict[str, float]]:
    """The same from MLflow's database."""
    steps: dict[int, dict[str, float]] = {}
    with closing(sqlite3.connect(database)) as connection:
        for key, value, step in connection.execute("select key, value, step from metrics where is_nan = 0"):
            steps.setdefault(step, {})[key] = value
    return steps


@contextmanager
def services() -> Iterator[tuple[ExitStack, dict[str, FaultServer]]]:
    """The scorers, and what ends them. Those of `far` and `judge` meet each fault once after their first answer."""
    turns = ["", *(fault for name in FAULTS for fault in (name, ""))]
    slow = {"late_s": 30.0, "pause_s": 0.5}
    with ExitStack() as stack:
        yield (
            stack,
            {
                "far": stack.enter_context(fault_server(brightness, script=turns, **slow)),
                "judge": stack.enter_context(fault_server(chat, script=turns, **slow)),
                "dead": stack.enter_context(fault_server(brightness)),
            },
        )


def reward_settings(servers: dict[str, FaultServer]) -> list[str]:
    common = {"deadline_s": DEADLINE_S, "retries": 1, "batch_size": 2}
    remote = {"class": "remote", "timeout_s": TIMEOUT_S, "token_env": "FAULTY_TOKEN"}
    pools: dict[str, dict[str, Any]] = {
        "far": remote | {"url": servers["far"].url},
        "dead": remote | {"url": servers["dead"].url},
        "judge": {
            "class": "vlm_judge",
            "endpoint": f"{servers['judge'].url}/v1",
            "model": "m",
            "gpus": 0,
            "token_env": "FAULTY_TOKEN",
        },
        "near": {"class": "tests.helpers.visible_rewards:Brightness"},
    }
    row = ", ".join(f"{name}: 0.25" for name in pools)
    return [
        *(f"rewards.{name}.{key}={value}" for name, own in pools.items() for key, value in (own | common).items()),
        *(f"rewards.weights.{task}={{{row}}}" for task in ("t2i", "edit", "text", "reasoning")),
    ]


def test_a_run_outlives_its_scorers(tmp_path: Path, empty_database: Path) -> None:
    world = make_world(tmp_path)
    folder = world / "runs" / "faults"
    folder.parent.mkdir()
    (folder.parent / "mlflow.db").write_bytes(empty_database.read_bytes())
    quiet = ("evaluation.prompts=0", "tracking.grid_every=0", "train.checkpoint_every=100", "experience.journal=1")
    with services() as (stack, servers):
        run = Watched(world, "run.name=faults", f"train.steps={STEPS}", *quiet, *reward_settings(servers))
        try:
            run.reached(folder, 1)
            servers["dead"].unplug()
            gone = time.monotonic()
            assert run.said("reward pool dead does not answer") - gone < DEADLINE_S + SLACK_S
            run.reached(folder, 6)
            servers["judge"].unplug()
            pulled = time.monotonic()
            run.said("reward pool judge does not answer", since=pulled)
            stack.enter_context(fault_server(chat, port=servers["judge"].server_address[1]))
            run.said("reward pool judge: answers again", since=pulled)
            run.finish()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
    for server in (servers["far"], servers["judge"]):
        assert all(server.fates[fault] for fault in FAULTS), server.fates
    check_accounts(logged(folder))
    check_accounts(tracked(folder.parent / "mlflow.db"))
    check_values(logged(folder))
    assert TOKEN not in run.output
    for file in [path for path in folder.parent.rglob("*") if path.is_file()]:
        assert TOKEN.encode() not in file.read_bytes(), file
    for server in servers.values():
        assert server.heads[0]["Authorization"] == f"Bearer {TOKEN}"


def check_accounts(steps: dict[int, dict[str, float]]) -> None:
    """asked = scored + missing by reason, for each reward and step; and the steps' own counts say the same."""
    for name in REWARDS:
        missing = 0.0
        for step in range(1, STEPS + 1):
            found = steps[step]
            by_reason = sum(value for key, value in found.items() if key.startswith(f"pool/{name}/missing/"))
            missing += found[f"reward_missing/{name}"]
            assert found[f"pool/{name}/asked"] == step * IMAGES
            assert found[f"pool/{name}/scored"] + by_reason == step * IMAGES
            assert by_reason == found[f"pool/{name}/missing"] == missing
    last = steps[STEPS]
    assert last["pool/near/missing"] == 0 < last["pool/far/missing"]
    assert last["pool/far/missing/parse"] > 0 < last["pool/far/missing/deadline"]
    assert last["pool/dead/missing/transport"] >= (STEPS - 4) * IMAGES
    assert last["reward_missing/dead"] == IMAGES
    assert last["reward_missing/far"] == last["reward_missing/judge"] == 0
    assert all(steps[step]["time/reward_s"] < DEADLINE_S + SLACK_S for step in range(1, STEPS + 1))


def check_values(steps: dict[int, dict[str, float]]) -> None:
    """All rewards see the same brightness, so where none of its scores is missing a mean is that of `near`."""
    for name in ("far", "judge"):
        whole = [found for found in steps.values() if not found[f"reward_missing/{name}"]]
        assert len(whole) >= 2
        for found in whole:
            assert found[f"reward/{name}"] == pytest.approx(found["reward/near"], abs=1e-4)
