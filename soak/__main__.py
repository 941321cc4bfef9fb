"""Long trials of a run's promises, with a table: `make soak`, or `python -m soak --schedules 20`.

Every trial is seeded and needs nothing but the tiny world in assets/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from deepgen.cluster.private import start_private, usable_cpus
from deepgen.config import Settings, load_settings
from deepgen.config.recipes import find_recipe
from deepgen.data.parquet import read_records
from soak.defects import DEFECT_HEADER, defect_rows, run_defects
from soak.fuzz import FUZZ_HEADER, SHARES, run_fuzz
from soak.hacking import CASES, HACKING_HEADER, hacking_rows, run_trials, wrong
from soak.kills import KILL_HEADER, kill_rows, run_kills
from soak.mixing import MIXING_HEADER, ROOT, SEEDS, draw_mixing, draw_samples, mixing_rows, run_mixing
from soak.schedules import Outcome, Schedule, draw_schedules, run_schedule, start_actors

ACTORS = 4
KILLS_A_RUN = 8
LONGEST_S = 0.3  # of one delay: about what a group takes to be sampled here
HEADER = (
    "| max_staleness | schedules | actors | steps | different results | versions of the steps |\n" + "|---" * 6 + "|"
)


def schedule_settings(folder: str, max_staleness: int, schedule: Schedule) -> Settings:
    """Five steps of two groups of four on the tiny world, rewarded by `DelayedBrightness`."""
    weights = [f"rewards.weights.{task}={{delayed: 1.0}}" for task in ("t2i", "reasoning", "text", "edit")]
    overrides = [
        f"run.dir={folder}",
        f"experience.max_staleness={max_staleness}",
        "train.steps=5",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "algorithm.kl=none",  # on-policy, the learner then takes the groups one by one
        "rewards.delayed.class=soak.schedules:DelayedBrightness",
        f"rewards.delayed.delay_s={schedule.longest_s}",
        f"rewards.delayed.delay_seed={schedule.seed}",
        *weights,
    ]
    return load_settings(find_recipe("tiny-rl"), overrides)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--only", choices=tuple(TRIALS), help="one kind of trial instead of all")
    parser.add_argument("--schedules", type=int, default=50, help="schedules for each max_staleness (default 50)")
    parser.add_argument("--defects", type=int, default=500, help="damaged weights (default 500)")
    parser.add_argument("--kills", type=int, default=200, help="killed processes (default 200)")
    parser.add_argument("--fuzz", type=int, default=55_000, help="damaged and hostile inputs (default 55,000)")
    parser.add_argument("--mixing", type=int, default=len(SEEDS), help="seeds of mixed rewards, at most 3 (default 3)")
    parser.add_argument("--hacking", type=int, default=7, help="runs for each reward hacked or not (default 7)")
    arguments = parser.parse_args()
    failed = [try_it(getattr(arguments, n)) for n, try_it in TRIALS.items() if arguments.only in (None, n)]
    return 1 if any(failed) else 0


def try_schedules(count: int) -> int:
    """Print the table of schedules. Returns how many ended differently."""
    import ray

    start_private(ACTORS, log_to_driver=False)
    schedules = draw_schedules(count, ACTORS, LONGEST_S)
    different = 0
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = schedule_settings(folder, 0, schedules[0])
        prompts, actors = read_records(settings.data.prompts), start_actors(settings, ACTORS)
        for max_staleness in (0, 1, 2):
            outcomes = [
                run_schedule(schedule_settings(folder, max_staleness, schedule), prompts, actors, schedule)
                for schedule in tqdm(schedules, desc=f"max_staleness {max_staleness}", leave=False)
            ]
            print(row(max_staleness, schedules, outcomes), flush=True)
            different += odd_ones(outcomes)
    ray.shutdown()
    return different


def try_defects(count: int) -> int:
    """Print the table of damaged weights. Returns how many were used."""
    outcomes = run_defects(load_settings(find_recipe("tiny-rl"), []), count)
    print(DEFECT_HEADER, *defect_rows(outcomes), sep="\n", flush=True)
    return sum(counts["missed"] for counts in outcomes.values())


def try_kills(count: int) -> int:
    """Print the table of kills. Returns how many runs did not end with the bits of the undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        trials = run_kills(Path(folder), count, KILLS_A_RUN)
    print(KILL_HEADER, *kill_rows(trials), sep="\n", flush=True)
    return sum(not trial.same for trial in trials)


def try_fuzz(count: int) -> int:
    """Print the table of damaged and hostile inputs. Returns how many the readers did not take or refuse properly."""
    print(FUZZ_HEADER, flush=True)
    faults = 0
    counts = [count * share // sum(SHARES.values()) for share in SHARES.values()]
    with ThreadPoolExecutor(usable_cpus()) as watchers:  # one kind each, in a process of its own
        outcomes = watchers.map(run_fuzz, SHARES, counts)
        for kind, outcome in zip(
            SHARES, tqdm(outcomes, "kinds of input", len(SHARES), leave=False, disable=None), strict=True
        ):
            found = (f"{kind} {number}: {what}" for number, what in outcome.faults[:20])
            tqdm.write("\n".join([outcome.row(kind), *found]))
            faults += len(outcome.faults)
    return faults


def try_mixing(count: int) -> int:
    """Print the table of mixed rewards and draw it. Returns in how many runs something else than expected decides."""
    print(MIXING_HEADER, flush=True)
    runs, folder = [], ROOT / "runs" / "mixing"
    for run in run_mixing(folder, SEEDS[:count]):
        print(*mixing_rows(run), sep="\n", flush=True)
        runs.append(run)
    draw_mixing(runs, folder / "mixing.png")
    draw_samples(folder, SEEDS[0], folder / "samples.png")
    print(f"pictures: {folder / 'mixing.png'}, {folder / 'samples.png'}")
    return sum((run.share("aesthetic") > 0.5) != (run.method == "gdpo") for run in runs)


def try_hacking(count: int) -> int:
    """Print the table of hacked and honest rewards. Returns how many shares miss what is wanted.

    The runs are noted in runs/soak-hacking.jsonl: interrupted, the trial goes on from there.
    """
    record = Path("runs") / "soak-hacking.jsonl"
    record.parent.mkdir(exist_ok=True)
    trials = run_trials(tuple(CASES), count, record)
    print(HACKING_HEADER, *hacking_rows(trials), sep="\n", flush=True)
    return wrong(trials)


TRIALS = {
    "schedules": try_schedules,
    "defects": try_defects,
    "kills": try_kills,
    "fuzz": try_fuzz,
    "mixing": try_mixing,
    "hacking": try_hacking,
}


def odd_ones(outcomes: Sequence[Outcome]) -> int:
    """How many schedules ended differently from the first, which had no delays."""
    first = outcomes[0]
    return sum((o.checksum, o.versions) != (first.checksum, first.versions) for o in outcomes)


def row(max_staleness: int, schedules: Sequence[Schedule], outcomes: Sequence[Outcome]) -> str:
    """One line of the table."""
    actors = sorted({schedule.actors for schedule in schedules})
    versions = ", ".join(map(str, outcomes[0].versions))
    cells = [max_staleness, len(outcomes), f"{actors[0]} to {actors[-1]}", len(outcomes[0].versions)]
    return "| " + " | ".join(map(str, [*cells, odd_ones(outcomes), versions])) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
