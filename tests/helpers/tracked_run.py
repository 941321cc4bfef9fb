"""Records a run as a learner does: `python -m tests.helpers.tracked_run FIRST LAST SETTING...` logs these steps."""

from __future__ import annotations

import sys
import time

import numpy as np

from deepgen.config import load_settings
from deepgen.tracking.tracker import Tracker


def main(first: int, last: int, overrides: list[str]) -> None:
    settings = load_settings(None, overrides)
    with Tracker(settings, "rl") as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {"reward/total": step / 10, "Loss/图": 1.0, "loss/图": 2.0, "x" * 300: 3.0, "a:b": step})
            if step % 10 == 0:
                tracker.log_images("samples", step, np.full((32, 32, 3), step, np.uint8))
                tracker.tag("alarm.kl", f"since step {step}\0\ud800")
            time.sleep(0.1)
        if not tracker.flush(120):
            sys.exit(f"{tracker.counts()}")
        counts = tracker.counts()
        print(tracker.run_id, counts.failed, counts.refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
