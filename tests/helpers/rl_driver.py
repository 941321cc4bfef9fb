"""`rl_driver.py KEY=VALUE ...`: runs stages/rl.py on its own small Ray cluster, whose workers can import `tests`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)

from deepgen.cluster.connect import QUIET_ENVIRONMENT  # noqa: E402
from deepgen.config import run_program  # noqa: E402
from stages.rl import main  # noqa: E402

if __name__ == "__main__":
    os.environ.update(QUIET_ENVIRONMENT, PYTHONPATH=ROOT)
    import ray  # ray reads its authentication mode on import

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=True,
    )
    run_program(main)
