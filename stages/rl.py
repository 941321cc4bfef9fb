"""Stage 3, reinforcement learning: MR-GRPO on the DiT (method 3).

    python stages/rl.py [--recipe NAME_OR_PATH] [KEY=VALUE ...] [--resume] [--plan]

Held-out prompts are drawn and scored before the first step and after the last one, with the same seeds; the table at
the end compares the two.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from actors.learner.checkpoint_store import AVERAGED, CheckpointStore  # noqa: E402
from actors.learner.preflight import own_folder, prepare_run  # noqa: E402
from actors.messages import LearnerJob  # noqa: E402
from actors.plan import plan_text  # noqa: E402
from deepgen.cluster.connect import connect  # noqa: E402
from deepgen.cluster.resources import rl_needs  # noqa: E402
from deepgen.config import Settings, UserError, parse_command_line, run_program  # noqa: E402
from deepgen.data.loading.mixture import check_training_data  # noqa: E402
from deepgen.data.records import Record  # noqa: E402
from deepgen.data.usable import usable_records  # noqa: E402
from deepgen.evaluation.choose import heldout_records  # noqa: E402
from deepgen.evaluation.pictures import grid_rows  # noqa: E402
from deepgen.evaluation.results import Evaluation  # noqa: E402

BEFORE, AFTER = "evaluation-before.npz", "evaluation-after.npz"
MARGIN_S = 30.0  # an actor's own error, which says more, comes first
END_S = 3.0


def main() -> int:
    settings = prepare_run(parse_command_line("rl", sys.argv[1:], plan_text), "rl")
    checkpoint = CheckpointStore(settings, "rl").newest() if settings.run.resume else None
    resumes = checkpoint is not None
    with own_folder(settings):
        prompts, heldout = read_prompts(settings), heldout_records(settings)
        if settings.algorithm.sft_coef:
            check_training_data(settings)
        gpus = connect(settings, rl_needs, code_root=ROOT)
        from actors.experience.prompt_order import check_state

        if checkpoint:
            check_state(settings, prompts, checkpoint.source)
    from actors.start import start_rollouts, start_stream

    say(f"starting {settings.rollout.actors} rollout actors and the rewards {', '.join(settings.rewards.used())}")
    rollouts = start_rollouts(settings, gpus=gpus)
    stream = start_stream(settings, prompts, rollouts, resume=resumes, gpus=gpus)
    try:
        run(settings, stream, heldout, gpus)
    finally:
        end(stream)
    return 0


def run(settings: Settings, stream: Any, heldout: list[Record], gpus: bool) -> None:
    """Evaluate, train, evaluate, report."""
    import ray

    from actors.start import learner_parts, start_learner

    ray.get(stream.start.remote(), timeout=settings.cluster.start_deadline_s + MARGIN_S)
    before = evaluate_before(settings, stream, heldout)  # goes on while the learner starts
    ray.get(stream.begin.remote(), timeout=MARGIN_S)
    result = start_learner(LearnerJob("rl", settings, learner_parts(stream), gpus))
    if before is not None:
        after = wait_for_evaluation(settings, order_evaluation(settings, stream, heldout, result))
        after.save(settings.run.folder / AFTER)
        averaged = None
        if settings.train.ema_decay:
            drawn = order_evaluation(settings, stream, heldout, result.with_name(AVERAGED), averaged=True)
            averaged = wait_for_evaluation(settings, drawn)
        report(settings, before.result(), after, averaged)
    say(f"the trained model is {result}")


def end(stream: Any) -> None:
    """Let the stream end its reward pools; one that is gone has nothing left to end."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(stream.stop.remote(), timeout=END_S)


def read_prompts(settings: Settings) -> list[Record]:
    """RL prompts that can be used (`usable_records`), each of a task that has rewards. UserError names file and row."""
    prompts = []
    for (file, row), record in usable_records(settings, "data.prompts"):
        if not any(weight > 0 for weight in settings.rewards.weights.get(record.task, {}).values()):
            raise UserError(
                f"{file}, row {row}: task {record.task} has no weight above 0 in rewards.weights; "
                f"allowed: tasks with a reward, so remove it or set e.g. rewards.weights.{record.task}.judge=1"
            )
        prompts.append(record)
    return prompts


def evaluate_before(settings: Settings, stream: Any, heldout: Sequence[Record]) -> Future[Evaluation] | None:
    """The initial policy on the held-out prompts (None without any): drawn now, or by an earlier start of this run."""
    if not heldout:
        return None
    path = settings.run.folder / BEFORE
    before: Future[Evaluation] = Future()
    if settings.run.resume and path.exists() and (saved := Evaluation.load(path, heldout)):
        before.set_result(saved)
        return before
    drawn = order_evaluation(settings, stream, heldout)  # here, so that it comes before the first step

    def finish() -> None:
        try:
            evaluation = wait_for_evaluation(settings, drawn)
            if evaluation.version != 0:
                raise RuntimeError(f"the evaluation before the first step was drawn by version {evaluation.version}")
            evaluation.save(path)
            say("held-out before: " + means_text(evaluation))
            before.set_result(evaluation)
        except Exception as error:  # noqa: BLE001  # carried to the main thread, which raises it
            before.set_exception(error)

    threading.Thread(target=finish, daemon=True).start()  # daemon: Ctrl-C does not wait for it
    if settings.run.resume:
        before.result()  # a resumed learner publishes other weights as soon as it is there
    return before


def order_evaluation(
    settings: Settings,
    stream: Any,
    heldout: Sequence[Record],
    folder: Path | None = None,
    *,
    averaged: bool = False,
) -> Any:
    """Have the held-out prompts drawn and scored; `folder`: by the policy that lies there, or by its average."""
    samples = settings.evaluation.samples_per_prompt
    return stream.evaluate.remote(heldout, samples, folder=folder, averaged=averaged)


def wait_for_evaluation(settings: Settings, drawn: Any) -> Evaluation:
    import ray

    evaluation: Evaluation = ray.get(drawn, timeout=settings.experience.deadline_s)
    return evaluation


def report(settings: Settings, before: Evaluation, after: Evaluation, averaged: Evaluation | None = None) -> None:
    """Table, before/after grid and MLflow entries of the whole run; `averaged`: after it, by the averaged weights."""
    from deepgen.tracking.curves import CURVES, draw_curves
    from deepgen.tracking.grids import before_after_grid
    from deepgen.tracking.journal import FILE_NAME
    from deepgen.tracking.paired_table import paired_table
    from deepgen.tracking.tracker import Tracker

    folder, seed = settings.run.folder, settings.evaluation.seed
    table = paired_table(
        before.columns(), after.columns(), before.sample_weights(), prompt_ids=before.sample_ids(), seed=seed
    )
    table.save_json(folder / "report.json")
    subtitle = f"{settings.run.name}: {after.version} steps; same prompts, seeds and sampler"
    before_after_grid(folder / "before-after.png", grid_rows(before, after), subtitle=subtitle)
    with Tracker(settings, "rl", attach=True) as tracker:  # the learner's run, which has ended
        for evaluation in (before, after):
            tracker.log(evaluation.version, {f"eval/{name}": mean for name, mean in evaluation.means().items()})
        if averaged:
            tracker.log(after.version, {f"eval_ema/{name}": mean for name, mean in averaged.means().items()})
        tracker.log_file(folder / "before-after.png")
        tracker.log_file(folder / "report.json")
        draw_curves(folder / FILE_NAME, folder / CURVES, title=settings.run.name)
        tracker.log_file(folder / CURVES)
        page = tracker.where()
    count, samples = len(before.records), before.scores.shape[1]
    print(f"\n{count} held-out prompts, {samples} images each, seed {seed}, {settings.evaluation.num_steps} steps")
    print(f"\n{table.to_text()}\n")
    if averaged:
        say("averaged weights after: " + means_text(averaged))
    say(f"grid:   {folder / 'before-after.png'}")
    say(f"curves: {folder / CURVES}")
    say(f"MLflow: {page}")


def means_text(evaluation: Evaluation) -> str:
    return "  ".join(f"{name} {mean:.3f}" for name, mean in evaluation.means().items())


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_program(main)
