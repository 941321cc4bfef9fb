"""Remake everything in assets/tiny with one command: the world, the small foundation models, then both training stages.

    python -m stages.base.make_all [--from STEP] [--list]

Each step is a program of its own and leaves its result in runs/base or assets/tiny, so an interrupted run continues
with --from. Needs npm (the emoji packages are fetched once into runs/base/packages).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from deepgen.config import UserError, run_program
from stages.base.common import DATA, MODEL

WORK = Path("runs/base")
PACKAGES = {"fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6", "emojibase-data": "emojibase-data@17.0.0"}


def packages() -> None:
    """Fetch and unpack the npm packages, unless they are there."""
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


def module(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", f"stages.base.{name}", *args]


def stage(name: str, *args: str) -> list[str]:
    return [sys.executable, f"stages/{name}.py", "--recipe", f"tiny-{name}", *args]


STEPS: dict[str, list[str] | None] = {
    "packages": None,
    "world": module("world", "--packages", str(WORK / "packages")),
    "tokenizer": module("tokenizer"),
    "vae": module("vae"),
    "vlm": module("vlm"),
    "dit": module("dit"),
    "decoder": module("vae", "--decoder"),
    "judge": module("vlm", "--judge"),
    "clip": module("clip"),
    "aesthetic": module("aesthetic"),
    "pretrain": stage("pretrain"),
    "sft": stage("sft", "model.weights=runs/tiny-pretrain/model"),
    "collect": module("collect", "runs/tiny-sft/model"),
    "report": module("report"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", choices=STEPS, default="packages", help="continue with this step")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args()
    names = list(STEPS)
    if args.list:
        print("\n".join(names))
        return 0
    DATA.mkdir(parents=True, exist_ok=True)
    MODEL.mkdir(parents=True, exist_ok=True)
    for name in names[names.index(args.first) :]:
        begin = time.monotonic()
        print(f"== {name}", flush=True)
        command = STEPS[name]
        if command is None:
            packages()
        elif subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, check=False).returncode:
            raise UserError(
                f"make base: step {name!r} failed; mend it and continue with: make base ARGS='--from {name}'"
            )
        print(f"== {name} took {(time.monotonic() - begin) / 60:.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    run_program(main)
