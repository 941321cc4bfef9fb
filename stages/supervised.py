"""The common body of pretrain and sft: check everything, connect, train on records, draw the curves."""

from __future__ import annotations

import sys
from pathlib import Path

from actors.learner.preflight import own_folder, prepare_run
from actors.learner.run_control import run_lock
from actors.messages import LearnerJob
from deepgen.cluster.connect import connect
from deepgen.config import Settings, parse_command_line
from deepgen.data.loading.mixture import check_training_data
from deepgen.evaluation.choose import heldout_records
from deepgen.models.stage_parts import Stage
from deepgen.planning.plan import plan_text
from deepgen.storage.mirror import mirrored


def main(stage: Stage) -> int:
    settings = parse_command_line(stage, sys.argv[1:], plan_text)
    with run_lock(settings), mirrored(settings.run.folder, resume=settings.run.resume):
        train(prepare_run(settings, stage), stage)
    return 0


def train(settings: Settings, stage: Stage) -> None:
    """Check the data, connect, train to the end."""
    with own_folder(settings):
        check_training_data(settings)
        heldout_records(settings)  # only for its checks; the learner reads them itself
        gpus = connect(settings, code_root=Path(__file__).resolve().parents[1])
    from actors.objectives.build import build_flow_matching  # late: --help needs no torch
    from actors.start import start_learner
    from deepgen.tracking.alarms import last_words
    from deepgen.tracking.curves import record_curves
    from deepgen.tracking.journal import FILE_NAME, read_steps

    result = start_learner(LearnerJob(stage, settings, build_flow_matching, gpus))
    print(record_curves(settings, stage))
    print(f"done; the next stage takes model.weights={result}")
    for line in last_words(read_steps(settings.run.folder / FILE_NAME, settings.train.steps)):
        print(line)
