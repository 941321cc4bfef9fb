"""Report on an rl run: held-out prompts before and after with the same seeds, a table, a picture, MLflow.

Evaluation during the run belongs to the learner (`actors/objectives/observer.py`). Both use the experience stream.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.learner.checkpoints.checkpoint_store import AVERAGED
from actors.learner.run_control import read_halt
from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.errors import writing
from deepgen.evaluation.pictures import grid_rows
from deepgen.evaluation.results import AFTER, BEFORE, Evaluation, evaluation_metrics

if TYPE_CHECKING:
    from actors.experience.stream_client import Request


class BeforeAfter:
    """The comparison of one run. Without held-out prompts nothing happens. `stream`: the experience stream's handle."""

    def __init__(self, settings: Settings, stream: Any, heldout: Sequence[Record]) -> None:
        from actors.experience.stream_client import StreamClient  # late: --help needs no Ray

        self._settings, self._heldout = settings, heldout
        self._client = StreamClient(stream, settings.experience.deadline_s)
        self._folder = settings.run.folder
        self._before: Future[Evaluation] = Future()

    def begin(self) -> None:
        """Start evaluating the initial policy, or load the evaluation that an earlier start of this run has saved."""
        if not self._heldout:
            return
        path = self._folder / BEFORE
        if self._settings.run.resume and path.exists() and (saved := Evaluation.load(path, self._heldout)):
            self._before.set_result(saved)
            return
        drawn = self._order(0)  # requested here, so that it comes before the first step

        def finish() -> None:
            try:
                evaluation: Evaluation = self._client.wait(drawn)
                with writing("the evaluation", path):
                    evaluation.save(path)
                say("held-out before: " + means_text(evaluation))
                self._before.set_result(evaluation)
            except Exception as error:  # noqa: BLE001  # carried to the main thread, which raises it
                self._before.set_exception(error)

        threading.Thread(target=finish, daemon=True).start()  # daemon: Ctrl-C does not wait for it

    def report(self, result: Path) -> None:
        """Evaluate the trained model in folder `result` and the averages beside it, and compare with before."""
        if not self._heldout:
            return
        halt = read_halt(self._folder)
        steps = halt.result_step if halt else self._settings.train.steps
        after = self._client.wait(self._order(steps, result))
        with writing("the evaluation", self._folder / AFTER):
            after.save(self._folder / AFTER)
        averaged = None
        if self._settings.train.ema_decay:
            averaged = self._client.wait(self._order(steps, result.with_name(AVERAGED), averaged=True))
        write_report(self._settings, self._before.result(), after, averaged)

    def _order(self, version: int, folder: Path | None = None, *, averaged: bool = False) -> Request:
        """Request images and scores of the prompts. `folder`: draw with the weights (or averages) in this folder."""
        samples = self._settings.evaluation.samples_per_prompt
        named = {"version": version, "folder": folder, "averaged": averaged}
        return self._client.request("evaluate", self._heldout, samples, **named)


def write_report(settings: Settings, before: Evaluation, after: Evaluation, averaged: Evaluation | None = None) -> None:
    """Write table, before/after grid and MLflow entries. `averaged`: the averaged weights' evaluation."""
    from deepgen.tracking.curves import CURVES, draw_curves
    from deepgen.tracking.grids import before_after_grid
    from deepgen.tracking.journal import FILE_NAME
    from deepgen.tracking.paired_table import paired_table
    from deepgen.tracking.tracker import Tracker

    folder, seed = settings.run.folder, settings.evaluation.seed
    table = paired_table(
        before.columns(), after.columns(), before.sample_weights(), prompt_ids=before.sample_ids(), seed=seed
    )
    subtitle = f"{settings.run.name}: {after.version} steps; same prompts, seeds and sampler"
    with writing("the report", folder):
        table.save_json(folder / "report.json")
        before_after_grid(folder / "before-after.png", grid_rows(before, after), subtitle=subtitle)
    with Tracker(settings, "rl", attach=True) as tracker:  # the learner's run, which has ended
        for evaluation in (before, after):
            tracker.log(evaluation.version, evaluation_metrics(evaluation))
        if averaged:
            tracker.log(after.version, {f"eval_ema/{name}": mean for name, mean in averaged.means().items()})
        tracker.log_file(folder / "before-after.png")
        tracker.log_file(folder / "report.json")
        draw_curves(folder / FILE_NAME, folder / CURVES, title=settings.run.name)
        tracker.log_file(folder / CURVES)
        page = tracker.where()
    count, samples = len(before.records), before.scores.shape[1]
    steps, guidance = settings.evaluation.num_steps, settings.evaluation.guidance_scale
    print(f"\n{count} held-out prompts, {samples} images each, seed {seed}, {steps} steps, guidance {guidance:g}")
    print(f"\n{table.to_text()}\n")
    if averaged:
        say("averaged weights after: " + means_text(averaged))
    say(f"grid:   {folder / 'before-after.png'}")
    say(f"curves: {folder / CURVES}")
    say(f"MLflow: {page}")


def record_pictures(settings: Settings) -> None:
    """Draw the rewards and the timeline of the run and attach them to its MLflow run."""
    from deepgen.tracking.curves import REWARDS, draw_rewards
    from deepgen.tracking.journal import FILE_NAME
    from deepgen.tracking.timeline_picture import log_timeline
    from deepgen.tracking.tracker import Tracker

    rewards = settings.run.folder / REWARDS
    with Tracker(settings, "rl", attach=True) as tracker:
        if draw_rewards(settings.run.folder / FILE_NAME, rewards, title=settings.run.name):
            tracker.log_file(rewards)
            say(f"rewards: {rewards}")
        for path in log_timeline(tracker, settings.run.name):
            say(f"timeline: {path}")


def means_text(evaluation: Evaluation) -> str:
    held_out = {f"{name} (held out)": mean for name, mean in evaluation.held_out_means().items() if name != "total"}
    return "  ".join(f"{name} {mean:.3f}" for name, mean in (evaluation.means() | held_out).items())


def say(line: str) -> None:
    print(line, flush=True)
