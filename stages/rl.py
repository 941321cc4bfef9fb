"""Stage 3, reinforcement learning: MR-GRPO on the DiT (method 3).

    python stages/rl.py [--recipe NAME_OR_PATH] [KEY=VALUE ...] [--resume] [--plan] [--status RUN]
    python stages/rl.py ... [--rollout-only STEPS] [--train-only FOLDER]       (`stages/rl_replay.py`)
    python stages/rl.py ... [--simulate "GPUs=64..4096 ..."]                   (`stages/rl_simulate.py`)

One training step, and where each part of it is:

    generate   actors/experience/rollout_actor.py: RolloutActor.sample_group
               platform/deepgen/diffusion/trajectory.py: sample
    score      actors/experience/scoring/reward_router.py: RewardRouter.score
               rewards/ocr.py: OcrReward.score                           (one file a reward)
    advantage  platform/deepgen/algorithms/advantages.py: group_advantages
    update     actors/learner/loop.py: update
               actors/objectives/policy_losses.py: ClippedRatio.loss
    sync       actors/experience/policy/weight_sync.py: publish_weights  (learner)
               actors/experience/policy/policy_version.py: LoadedPolicy.use  (rollout actors)

    The first three in a row: actors/experience/stream.py: ExperienceStream.make_step
    The last two in a row:    actors/learner/loop.py: TrainingLoop.run_step
    Who starts and wires all: actors/start.py: start_rollouts, start_stream, start_learner
    What travels in between:  actors/messages.py: Group

Held-out prompts are drawn and scored before the first step and after the last one, with the same seeds; the table at
the end compares the two (`stages/rl_report.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from actors.learner.checkpoints.checkpoint_store import CheckpointStore  # noqa: E402
from actors.learner.preflight import own_folder, prepare_run  # noqa: E402
from actors.learner.run_control import read_halt, result_text, run_lock  # noqa: E402
from actors.messages import LearnerJob  # noqa: E402
from deepgen.cluster.connect import connect  # noqa: E402
from deepgen.cluster.resources import rl_needs  # noqa: E402
from deepgen.config import Settings, parse_command_line, run_program  # noqa: E402
from deepgen.data.loading.mixture import check_training_data  # noqa: E402
from deepgen.data.records import Record  # noqa: E402
from deepgen.evaluation.choose import heldout_records  # noqa: E402
from deepgen.planning.plan import plan_text  # noqa: E402
from deepgen.storage.mirror import mirrored  # noqa: E402
from deepgen.tracking.alarms import last_words  # noqa: E402
from deepgen.tracking.journal import FILE_NAME, read_steps  # noqa: E402
from stages.rl_prompts import check_prompts  # noqa: E402
from stages.rl_replay import rollout_only, train_only  # noqa: E402
from stages.rl_report import BeforeAfter, record_pictures, say  # noqa: E402
from stages.rl_simulate import show_scale  # noqa: E402
from stages.rl_status import show_status  # noqa: E402

MARGIN_S = 30.0  # lets an actor's own error, which says more, arrive first
END_S = 3.0


def main() -> int:
    instead: dict[str, Callable[[Settings, str], None]] = {
        "status": show_status,
        "rollout-only": partial(rollout_only, wire),
        "train-only": partial(train_only, ROOT),
        "simulate": show_scale,
    }
    settings = parse_command_line("rl", sys.argv[1:], plan_text, instead)
    with run_lock(settings), mirrored(settings.run.folder, resume=settings.run.resume):
        settings = prepare_run(settings, "rl")
        wire(settings, run)
        record_pictures(settings)
        for line in last_words(read_steps(settings.run.folder / FILE_NAME, settings.train.steps)):
            say(line)
        if halt := read_halt(settings.run.folder):
            say(f"the run ended after step {halt.step}: {halt.line}")
            say(f"{result_text(halt)}; docs/reward-hacking.md says how to go on")
    return 0


def wire(settings: Settings, body: Callable[[Settings, Any, list[Record], bool], None]) -> None:
    """Check the prompts, connect, start the actors, run the body, end them."""
    checkpoint = CheckpointStore(settings, "rl").newest() if settings.run.resume else None
    with own_folder(settings):
        check_prompts(settings, checkpoint)
        heldout = heldout_records(settings)
        if settings.algorithm.sft_coef:
            check_training_data(settings)
        gpus = connect(settings, rl_needs, code_root=ROOT)
    from actors.experience.stream_client import StreamClient  # late: --help needs no Ray
    from actors.start import start_rollouts, start_stream

    say(f"starting {settings.rollout.actors} rollout actors and the rewards {', '.join(settings.rewards.used())}")
    rollouts = start_rollouts(settings, gpus=gpus)
    stream = start_stream(settings, rollouts, resume=checkpoint is not None, gpus=gpus)
    try:
        StreamClient(stream, settings.cluster.start_deadline_s + MARGIN_S).ask("start")
        body(settings, stream, heldout, gpus)
    finally:
        end(stream)


def run(settings: Settings, stream: Any, heldout: list[Record], gpus: bool) -> None:
    """Evaluate, train, evaluate, report."""
    from actors.experience.stream_client import StreamClient  # late: --help needs no Ray
    from actors.start import learner_parts, start_learner

    comparison = BeforeAfter(settings, stream, heldout)
    comparison.begin()  # continues while the learner starts
    StreamClient(stream, MARGIN_S).ask("begin")
    result = start_learner(LearnerJob("rl", settings, learner_parts(stream), gpus))
    comparison.report(result)
    say(f"the trained model is {result}")


def end(stream: Any) -> None:
    """Let the stream stop its reward pools. If the stream is gone, there is nothing left to stop."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(stream.stop.remote(), timeout=END_S)


if __name__ == "__main__":
    run_program(main)
