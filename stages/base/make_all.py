"""Remake everything in assets/tiny with one command: the world, the small foundation models, then both training stages.

    python -m stages.base.make_all [--from STEP] [--list]

Two steps run at a time, one thread each. Each step is a separate program. It writes results to runs/base or assets/tiny
and logs to runs/base/logs. runs/base/done lists finished steps, so an interrupted run can continue. Needs npm, which
fetches the emoji packages once into runs/base/packages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from deepgen.config import UserError, load_settings, run_program
from deepgen.config.recipes import find_recipe
from stages.base.training import DATA, MODEL

WORK = Path("runs/base")
PACKAGES = {"fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6", "emojibase-data": "emojibase-data@17.0.0"}
# The end of fine-tuning, on clean and faded pictures as recipe tiny-rl mixes them in its auxiliary loss.
MIXED = (
    f"data.weights={json.dumps(load_settings(find_recipe('tiny-rl')).data.weights)}",
    "run.name=tiny-mixed",
    "model.weights=runs/tiny-sft/model",
    "train.steps=160",
    "train.learning_rate=2e-4",
    "train.warmup_steps=10",
)
LANES = 2  # cores; small matrices gain little from a second thread in one training
SAY_EVERY_S = 30.0


@dataclass(frozen=True)
class Step:
    """One program, and the steps whose results it needs."""

    command: list[str]
    needs: tuple[str, ...] = ()


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path
    begin: float = field(default_factory=time.monotonic)

    def minutes(self) -> float:
        return (time.monotonic() - self.begin) / 60

    def last_line(self) -> str:
        """The last line of the log: the current progress bar."""
        text = self.log.read_bytes()[-2000:].decode(errors="replace").replace("\r", "\n").strip()
        return text.splitlines()[-1][:150] if text else ""


def module(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", f"stages.base.{name}", *args]


def stage(name: str, *args: str) -> list[str]:
    return [sys.executable, f"stages/{name}.py", "--recipe", f"tiny-{name}", *args]


def steps() -> dict[str, Step]:
    """All steps by name, in the order in which they start once their needs are met: the longest chain first."""
    drawn = ("--packages", str(WORK / "packages"))
    return {
        "world": Step(module("pictures.world", *drawn)),
        "tokenizer": Step(module("train_tokenizer"), ("world",)),
        "vae": Step(module("train_vae"), ("world",)),
        "lessons": Step(module("pictures.lessons", *drawn), ("world",)),
        "dit": Step(module("train_dit"), ("vae", "tokenizer")),
        "tower": Step(module("train_tower"), ("tokenizer", "lessons")),
        "vlm": Step(module("train_vlm"), ("tower",)),
        "bridge": Step(module("train_bridge"), ("dit", "vlm")),
        "pretrain": Step(stage("pretrain", "model.fresh_bridge=false"), ("bridge",)),
        "judge": Step(module("train_judge"), ("vlm",)),
        "clip": Step(module("train_clip"), ("tokenizer", "lessons")),
        "decoder": Step(module("train_vae", "--decoder"), ("dit",)),
        "aesthetic": Step(module("train_aesthetic"), ("clip", "decoder")),
        "sft": Step(stage("sft", "model.weights=runs/tiny-pretrain/model"), ("pretrain",)),
        "fade": Step(module("pictures.fade"), ("sft",)),
        "mixed": Step(stage("sft", *MIXED), ("fade",)),
        "collect": Step(module("collect", "runs/tiny-mixed/model"), ("mixed", "decoder")),
        "report": Step(module("base_report"), ("collect", "judge", "clip")),
    }


def fetch_packages() -> None:
    """Fetch and unpack the npm packages that are missing."""
    if shutil.which("npm") is None:
        raise UserError("make base: npm is not installed; it is needed to fetch the emoji packages (Node.js brings it)")
    for name, spec in PACKAGES.items():
        target = WORK / "packages" / name
        if target.exists():
            continue
        folder = WORK / "download"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), spec], check=True)
        archive = max(folder.glob("*.tgz"), key=lambda p: p.stat().st_mtime)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / name, filter="data")
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / name / "package").rename(target)


def after(name: str, plan: dict[str, Step]) -> set[str]:
    """`name` and all steps that depend on its result, directly or indirectly."""
    found = {name}
    for other, step in plan.items():  # each step comes after the steps it needs
        if found & set(step.needs):
            found.add(other)
    return found


def start(name: str, step: Step) -> Running:
    log = WORK / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": "."}
    with log.open("wb") as output:
        process = subprocess.Popen(step.command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    print(f"== {name}: started, output in {log}", flush=True)
    return Running(process, log)


def collect_finished(running: dict[str, Running], done: set[str]) -> None:
    """Move finished steps from `running` to `done`. Raises UserError if a step failed."""
    for name, run in list(running.items()):
        code = run.process.poll()
        if code is None:
            continue
        if code:
            raise UserError(f"make base: step {name} failed ({run.last_line()}); see {run.log}, then run it again")
        print(f"== {name}: done in {run.minutes():.1f} min; {run.last_line()}", flush=True)
        (WORK / "done").mkdir(parents=True, exist_ok=True)
        (WORK / "done" / name).touch()
        done.add(name)
        del running[name]


def run_all(plan: dict[str, Step], done: set[str]) -> None:
    """Run the unfinished steps, two at a time. Prints their progress every half minute."""
    running: dict[str, Running] = {}
    said = time.monotonic()
    try:
        while len(done) < len(plan):
            for name, step in plan.items():
                if len(running) < LANES and name not in done | set(running) and set(step.needs) <= done:
                    running[name] = start(name, step)
            time.sleep(0.5)
            collect_finished(running, done)
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                for name, run in running.items():
                    print(f"   {name}, {run.minutes():.1f} min: {run.last_line()}", flush=True)
    finally:
        for run in running.values():
            run.process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = steps()
    parser.add_argument("--from", dest="first", choices=plan, help="do this step and all that follow from it again")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args()
    done = {name for name in plan if (WORK / "done" / name).exists()}
    if args.list:
        print("\n".join(f"{name}{' (done)' if name in done else ''}" for name in plan))
        return 0
    if args.first:
        for name in after(args.first, plan) & done:
            (WORK / "done" / name).unlink()
            done.discard(name)
    DATA.mkdir(parents=True, exist_ok=True)
    MODEL.mkdir(parents=True, exist_ok=True)
    if not done:
        fetch_packages()
    run_all(plan, done)
    print("assets/tiny is complete; look at docs/images/base_*.webp and docs/base_figures.json")
    return 0


if __name__ == "__main__":
    run_program(main)
