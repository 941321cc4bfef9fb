"""Submit a program of this checkout as a job, as `ray job submit` does, with checks before anything is sent.

    python clusters/submit.py [--address http://HEAD:8265] -- python stages/rl.py --recipe tiny-rl run.dir=/shared/runs

Prints what the job prints, and ends with 0 if it succeeds. Ctrl-C leaves the job running.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from deepgen.cluster.submission import check_dashboard, follow, package_size, read_environment, submit  # noqa: E402
from deepgen.config import UserError, run_program  # noqa: E402

DASHBOARD = "http://127.0.0.1:8265"


def main() -> int:
    args = parse(sys.argv[1:])
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DASHBOARD
    environment = read_environment(args.runtime_env, args.working_dir)
    base = check_dashboard(address)
    size = package_size(environment)
    print(f"sending {args.working_dir}: {size / 2**20:.0f} MiB", flush=True)
    client, job = submit(base, args.command, environment, args.submission_id)
    print(f"job {job}; its page: {base}/#/jobs/{job}", flush=True)
    if args.no_wait:
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; `ray job logs {job} --follow` shows it, `ray job stop {job}` ends it", flush=True)
        raise


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python clusters/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--address", help=f"of the dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or {DASHBOARD}"
    )
    parser.add_argument(
        "--working-dir", type=Path, default=ROOT, metavar="FOLDER", help="what is sent; default: this checkout"
    )
    parser.add_argument(
        "--runtime-env",
        type=Path,
        default=ROOT / "clusters" / "runtime_env.yaml",
        metavar="FILE",
        help="what is left out, and variables of the processes; default: clusters/runtime_env.yaml",
    )
    parser.add_argument("--submission-id", metavar="ID", help="a name for the job, which must be new")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the job's end")
    parser.add_argument("command", nargs="+", help="after --: the program, as in: -- python stages/rl.py")
    args = parser.parse_args(arguments)
    if not args.working_dir.is_dir():
        raise UserError(f"--working-dir: no such folder: {args.working_dir}")
    args.working_dir = args.working_dir.resolve()
    return args


if __name__ == "__main__":
    run_program(main)
