"""A Ray cluster of several nodes on this machine, with the autoscaler, as `clusters/local.yaml` describes it.

    python clusters/local.py up        start it, and print the lines with which a job is submitted
    python clusters/local.py status    its nodes, and what waits for one
    python clusters/local.py down      end its processes, and remove its files

It listens on 127.0.0.1, wants a token, and touches no other Ray cluster of this machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this checkout's code, wherever the program is called from

from deepgen.cluster.fake_cluster import bring_up, take_down, tell  # noqa: E402
from deepgen.errors import run_program  # noqa: E402

COMMANDS = {"up": bring_up, "status": tell, "down": take_down}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    chosen = parser.parse_args().command
    for line in COMMANDS[chosen](ROOT / "clusters" / "local.yaml"):
        print(line, flush=True)


if __name__ == "__main__":
    run_program(main, resumes=False)
