"""Stage 1, alignment: the think tokens and the bridge learn to steer the frozen DiT (method 2).

python stages/pretrain.py [--recipe NAME_OR_PATH] [KEY=VALUE ...] [--resume] [--plan]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from actors.evaluation import heldout_records  # noqa: E402
from actors.launch import LearnerJob, own_folder, prepare_run, run_learner  # noqa: E402
from actors.plan import plan_text  # noqa: E402
from deepgen.cluster.connect import connect  # noqa: E402
from deepgen.config import parse_command_line, run_program  # noqa: E402
from deepgen.data.mixture import check_training_data  # noqa: E402


def main() -> int:
    settings = prepare_run(parse_command_line("pretrain", sys.argv[1:], plan_text), "pretrain")
    with own_folder(settings):
        check_training_data(settings)
        heldout_records(settings, judged=False)
        gpus = connect(settings, code_root=ROOT)
    from actors.objectives import build_flow_matching  # torch and DeepSpeed: not for --help
    from deepgen.tracking.curves import record_curves

    result = run_learner(LearnerJob("pretrain", settings, build_flow_matching, gpus))
    print(record_curves(settings, "pretrain"))
    print(f"done; the next stage takes model.weights={result}")
    return 0


if __name__ == "__main__":
    run_program(main)
