"""Serve rewards over HTTP, for the reward `remote` of other runs and machines.

    python stages/serve_rewards.py --rewards clip,ocr rewards.clip.path=weights/clip
    python stages/serve_rewards.py --recipe tiny-rl --port 9000
    python stages/serve_rewards.py --rewards examples.own_reward.brightness:Brightness

Each reward has an address, http://HOST:PORT/NAME, and replicas on Ray Serve: rewards.NAME.replicas of them, up to
--max-replicas while calls queue. Only this machine reaches them unless --host says otherwise, and then callers need a
token. Protocol and limits: docs/remote-rewards.md. Ends with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from deepgen.config import UserError, run_program  # noqa: E402
from rewards.remote.caller import is_loopback, read_token  # noqa: E402
from stages.generate import Parser, whole  # noqa: E402
from stages.scoring.reward_choice import add_arguments, chosen, needs_of  # noqa: E402

LOOK_S = 5.0  # between looks at what is served


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=whole(1), default=8801, help="(default: 8801)")
    parser.add_argument("--token-env", metavar="NAME", default="", help="environment variable with the callers' token")
    parser.add_argument("--max-replicas", type=whole(1), default=1, help="of each reward, while calls queue")
    args = parser.parse_intermixed_args(argv)
    if args.port > 65535:
        raise UserError(f"--port: got {args.port}; allowed: from 1 to 65535")
    if not args.token_env and not is_loopback(args.host):
        raise UserError(
            f"--host: got {args.host!r}, which other machines reach, without --token-env; allowed: 127.0.0.1, or both"
        )
    args.token = read_token(args.token_env, "--token-env") if args.token_env else ""
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    settings, pools = chosen(args)
    from deepgen.cluster.connect import connect

    os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1")  # at the usual 0.1 s busy machines warn
    gpus = connect(settings, needs_of(pools), code_root=ROOT)
    from actors.reward_service import Hosting, faults, start_services, stop_services

    hosting = Hosting(args.host, args.port, args.token, args.max_replicas)
    # Not inside the `try`: if Ray Serve runs on that cluster already, it is somebody else's and not ours to stop.
    addresses = start_services(pools, hosting, settings.cluster, gpus=gpus)
    try:
        for name, address in addresses.items():
            print(f"{name}: {address}", flush=True)
        told: dict[str, str] = {}
        while True:
            time.sleep(LOOK_S)
            now = faults()
            for name, fault in now.items():
                if told.get(name) != fault:
                    print(f"{name}: {fault}", flush=True)
            told = now
    finally:
        stop_services()


if __name__ == "__main__":
    run_program(main, resumes=False)
