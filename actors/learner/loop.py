"""The learner loop of all stages: take a batch, accumulate its gradients, step, publish, checkpoint.

The loop knows neither data sets nor rewards. A ``BatchSource`` hands it one batch per step, and an ``Objective`` turns
that batch into losses, micro-batch by micro-batch. Everything else (ZeRO, clipping, schedule, EMA, checkpoints, resume,
metrics) is written here once for pretrain, sft and rl. One optimizer step follows each batch, whatever the number of
micro-batches (method 3.7: the reference takes 61 steps a batch; we do not), unless the objective splits it into
mini-batches (`algorithm.updates_per_batch`). For everything else a batch is one step.

An update whose loss or gradient is not finite on any rank is left out on all of them. Its batch still counts as a step:
learning rate, averages, versions and checkpoints go on as if it had changed nothing, which is so. Only AdamW counts the
updates it has made.

Left out on purpose: how the processes start (``actors.learner.ray_train``) and what a batch contains.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.learner.checkpoints.checkpoint_store import AVERAGED, RESULT, CheckpointStore, Manifest, check_shards
from actors.learner.collectives import gather
from actors.learner.ema import Ema
from actors.learner.engine import TrainingEngine
from actors.learner.failed_step import keep_failed
from actors.learner.lr_schedule import learning_rate
from actors.learner.protocols import (
    Arriving,
    HeldLoss,
    Metrics,
    Objective,
    Parts,
    StepContext,
    WorkerContext,
)
from actors.learner.run_control import Halt, read_halt, result_text, stop_requested, write_halt
from deepgen.errors import UserError
from deepgen.monitoring.gauges import Gauges
from deepgen.seeds import stable_seed
from deepgen.tracking.alarms import GOOD_STEP, Alarms, News
from deepgen.tracking.journal import FILE_NAME, read_steps
from deepgen.tracking.progress import Phases, Progress
from deepgen.tracking.timeline import LEARNER, Recorder, Span

if TYPE_CHECKING:
    from deepgen.config.settings import Settings

MOST_SKIPPED = 5  # updates left out in a row that end the run
_SAY_EVERY_S = 1.0
_RL_FIGURES = {"policy/kl": "kl", "policy/clip_share": "clipped"}
_RL_PHASES = {"time/rollout_s": "rollout", "time/reward_s": "scoring", "time/update_s": "update", "time/sync_s": "sync"}


def train(
    context: WorkerContext, build: Callable[[WorkerContext], Parts], checkpoints: CheckpointStore, resume: bool
) -> bool:
    """Run one worker from the start or the newest checkpoint to ``train.steps``, then write the component folder.

    Returns False if it was asked to stop before; then there is a checkpoint of the last step instead. An alarm that
    stops the run or rolls it back ends it like its last step, with a note (`run_control.Halt`).
    Raises UserError if a checkpoint does not fit the run or cannot be written, or if nothing is trainable.
    """
    settings = context.settings
    trainable = context.model.trainable_parameters(context.stage)
    if not trainable:
        raise UserError(f"stage {context.stage}: nothing to train with model.lora_rank {settings.model.lora_rank}")
    context.model.train()
    parts = build(context)
    source = parts.source
    try:
        engine = TrainingEngine(settings, context.model, trainable, context.device)
        ema = Ema(engine.parameters, settings.train.ema_decay) if settings.train.ema_decay else None
        start = _restore(engine, ema, parts, checkpoints, resume, context)
        source.publish(engine, start)
        loop = TrainingLoop(context, parts, engine, ema, checkpoints, start)
        if start == 0:
            loop.begin()
        done = loop.ended or loop.run()
        if loop.halt:
            loop.end_early(loop.halt)
        checkpoints.finish()
        if done:
            _export(engine, ema, checkpoints.run_folder)
        return done
    finally:
        checkpoints.close(context.say)
        source.close()
        if parts.evaluator:
            parts.evaluator.close()


class TrainingLoop:
    """The body of the training loop and the state it keeps from step to step."""

    def __init__(
        self,
        context: WorkerContext,
        parts: Parts,
        engine: TrainingEngine,
        ema: Ema | None,
        checkpoints: CheckpointStore,
        start: int,
    ) -> None:
        self.context, (self.source, self.objective, self.evaluator, replayed) = context, parts
        self.engine, self.ema, self.checkpoints = engine, ema, checkpoints
        # The timeline is of runs with several actors; here are the phases of this rank.
        folder = checkpoints.run_folder if context.stage == "rl" else None
        self.recorder = Recorder(folder, f"{LEARNER}-{context.rank}")
        self.phases = Phases(clock=self.recorder.clock, ended=self._record)
        self.step = start
        self.end = replayed.steps.stop if replayed else context.settings.train.steps
        self.updates = context.settings.algorithm.updates_per_batch if context.stage == "rl" else 1  # a batch
        steps = self.end - (replayed.steps.start if replayed else 0)
        self.most_skipped = min(MOST_SKIPPED, steps * self.updates)  # a run without any update has failed
        self.progress = Progress(self.end, start)
        self.gauges = Gauges(context.settings.run.name)
        self.last_said = -math.inf
        tracking = context.settings.tracking
        self.alarms = Alarms(tracking) if context.stage == "rl" and context.tracker else None
        self.may_halt = context.stage == "rl" and any(tracking.action(name) != "report" for name in tracking.alarms)
        self.halt: News | None = None  # the alarm that ends the run, the same on all ranks
        self.good_step, self.saved = 0, start
        note = read_halt(checkpoints.run_folder)
        # Its workers have been started again since an alarm ended the run: its result is still to be written.
        self.ended = bool(note and note.attempt and (note.attempt, note.result_step) == (checkpoints.attempt, start))
        if context.tracker and not self.ended:
            write_halt(checkpoints.run_folder, None)
        if self.alarms and start:
            self.alarms.resume(read_steps(checkpoints.run_folder / FILE_NAME, start))

    def begin(self) -> None:
        """Evaluate the weights that the run starts from."""
        figures = self._evaluate(0)
        if figures and self.context.tracker:
            self.context.tracker.log(0, figures)
        if self.context.stage == "rl" and self.context.settings.tracking.action("hacking") == "roll_back":
            self._save(0)

    def run(self) -> bool:
        """Take the steps that are left, or those until an alarm ends the run. False: it was asked to stop before."""
        for step in range(self.step, self.end):
            if not self.run_step(step):
                return False
            if self.halt:
                break
        return True

    def run_step(self, step: int) -> bool:
        """Take one batch, update on it, publish one new version of the weights. False: that was the last."""
        context, begin, self.step = self.context, time.monotonic(), step
        with self.phases("wait"):
            batch = self.source.next(step, context.rank, context.world)
        if isinstance(batch, Arriving):
            batch.pieces = self._waited_for(batch.pieces)
        with self.phases("update"):
            metrics, faults = update(self.engine, self.objective, batch, self._step_context(step), context.settings)
            if faults:
                self._left_out(faults)
            if self.ema:
                self.ema.update(self.engine.parameters, step)
        with self.phases("publish"):
            self.source.publish(self.engine, step + 1)
        stop, last = self._stop_requested(), step + 1 == self.end
        if stop or last or (step + 1) % context.settings.train.checkpoint_every == 0:
            with self.phases("checkpoint"):
                self._save(step + 1)
        images = metrics.pop("images_sum", 0.0)
        metrics |= {"throughput/images_per_s": images / (time.monotonic() - begin)} if images else {}
        with self.phases("evaluate"):
            metrics |= self._evaluate(step + 1) | (self.evaluator.arrived() if self.evaluator else {})
        metrics |= self.source.metrics() | self.phases.take()
        self._log(step + 1, metrics)
        if context.tracker:
            self.gauges.step(step + 1, images, metrics)
        self.recorder.flush()
        if self.may_halt:
            self.halt, self.good_step = gather((self.halt, self.good_step), context.world)[0]
        return last or not stop

    def end_early(self, alarm: News) -> None:
        """Make the state of the run its result, or with roll_back the one before the held-out rewards began to fall.

        Collective. Raises UserError if there is no checkpoint from then.
        """
        folder, done, action = self.checkpoints.run_folder, self.step + 1, self._action(alarm.name)
        result = done
        if action == "roll_back":
            self.checkpoints.finish()
            good = self.checkpoints.newest(self.good_step)
            if good is None:
                raise UserError(f"{alarm.line}; {self.checkpoints.folder} has no checkpoint of step {self.good_step}")
            self.checkpoints.load(good, self.engine, self.ema)
            result = good.step
        halt = Halt(done, alarm.name, action, alarm.line, result, self.checkpoints.attempt)
        if self.context.rank == 0:
            self.checkpoints.set_aside(result)
            write_halt(folder, halt)
        if action == "stop" and self.saved != done:
            self._save(done)
        self.context.say(f"the run ends after step {done}, {result_text(halt)}")

    def _save(self, step: int) -> None:
        state, more = self.source.state_dict(step), self.source.writer(step)
        needed = self.evaluator.needed() if self.evaluator else frozenset()
        self.checkpoints.save(step, self.engine, self.ema, state, more, needed)
        self.saved = step

    def _action(self, alarm: str) -> str:
        return self.context.settings.tracking.action(alarm)

    def _left_out(self, faults: Mapping[int, str]) -> None:
        """Say which updates of the batch are left out, and save it. UserError if there were too many in a row.

        ``faults``: what was not finite, by the update's number in the batch.
        """
        engine, made = self.engine, self.updates - len(faults)
        # Before the first step, the state is that of model.weights. After an update on this batch, its start is lost.
        state = engine if self.step and not made else None
        note = keep_failed(self.source, state, self.checkpoints.run_folder, self._step_context(self.step))
        said = f"step {self.step}: {'; '.join(dict.fromkeys(faults.values()))}"
        counts = f"{len(faults)} left out, {engine.skipped_in_a_row} in a row, {engine.skipped} in all"
        if note and self.step and made:
            note += f"; beside {made} updates that were made: only --resume gets to the same weights again"
        if engine.skipped_in_a_row >= self.most_skipped:
            raise UserError(
                f"{said}; updates left out in a row: {engine.skipped_in_a_row}, so the run ends; a smaller "
                f"train.learning_rate may help, with --resume from the last checkpoint{note}"
            )
        self.context.say(f"{said}; updates: {counts}{note}")

    def _waited_for(self, pieces: Iterator[Any]) -> Iterator[Any]:
        """The pieces of a batch; the time until each comes counts as waiting."""
        end = object()
        while True:
            with self.phases("wait"):
                piece = next(pieces, end)
            if piece is end:
                return
            yield piece

    def _record(self, phase: str, begin: float, end: float) -> None:
        self.recorder.add(Span(f"{LEARNER} {self.context.rank}", LEARNER, phase, begin, end, step=self.step))

    def _stop_requested(self) -> bool:
        """Rank 0's answer for all: the request may come while ranks look at different times. Collective."""
        return gather(stop_requested(self.checkpoints.run_folder), self.context.world)[0]

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out metrics of the weights and of their averages after ``step`` steps; {} if none are due."""
        evaluate = self.evaluator.evaluation(step) if self.evaluator else None
        if evaluate is None:
            return {}
        model, here = self.context.model, self._step_context(step)
        model.eval()
        with torch.no_grad():
            figures: dict[str, float] = self.engine.run(evaluate, here, "")
            if self.ema and step:
                with self.ema.in_place(self.engine):
                    figures |= self.engine.run(evaluate, here, "_ema")
        model.train()
        return figures

    def _step_context(self, step: int) -> StepContext:
        context = self.context
        return StepContext(context.settings.run.seed, step, context.rank, context.world, context.device)

    def _log(self, done: int, metrics: dict[str, float]) -> None:
        if self.context.tracker:
            self.context.tracker.log(done, metrics | self._alarms(done, metrics))
        line = self.progress.line(done, _shown(metrics))
        now = time.monotonic()
        if now - self.last_said >= _SAY_EVERY_S or done == self.progress.total:
            self.context.say(line)
            self.last_said = now

    def _alarms(self, done: int, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of the alarms; one that begins or ends becomes a console line and a tag."""
        if self.alarms is None or self.context.tracker is None:
            return {}
        shown, news = self.alarms.step(done, metrics)
        for alarm in news:
            self.context.say(alarm.line)
            self.context.tracker.tag(f"alarm.{alarm.name}", alarm.tag)
            if alarm.begins and self._action(alarm.name) != "report":
                self.halt = self.halt or alarm
        self.good_step = int(metrics.get(GOOD_STEP, self.good_step))
        return shown


def update(
    engine: TrainingEngine, objective: Objective, batch: Any, context: StepContext, settings: Settings
) -> tuple[dict[str, float], dict[int, str]]:
    """Take one optimizer step for each mini-batch (usually one), with the same learning rate.

    Returns the batch's metrics, reduced over all its micro-batches and ranks, plus the mean gradient norm of the steps
    and the learning rate; and for each step that was left out, by its number, what was not finite, the same on all
    ranks. Raises UserError on all ranks if a step has made a weight that is not finite.
    """
    rate, numbers = learning_rate(settings, context.step), itertools.count()
    reported, norms, faults = list[Metrics](), list[float](), dict[int, str]()
    for number, micros in enumerate(_mini_batches(engine, objective, batch, context)):
        metrics, fault = _accumulate(engine, objective, micros, numbers, batch, context)
        norm = engine.step(rate, leave_out=bool(fault))
        reported += metrics
        norms.append(norm)
        if fault or not math.isfinite(norm):
            faults[number] = fault or f"the norm of the gradient is {norm}"
    if bad := engine.not_finite():
        raise UserError(
            f"step {context.step}: {bad} is no longer finite after the update, of which nothing is kept; lower "
            "train.learning_rate or train.weight_decay, then continue from the last checkpoint with --resume"
        )
    own = {"train/grad_norm": sum(norms) / len(norms), "train/skipped_updates": float(engine.skipped)}
    return reduce_metrics(reported, context.world) | own | {"train/learning_rate": rate}, faults


def _accumulate(
    engine: TrainingEngine,
    objective: Objective,
    micros: Iterable[Any],
    numbers: Iterator[int],
    batch: Any,
    context: StepContext,
) -> tuple[list[Metrics], str]:
    """Add up the gradients of the micro-batches of one optimizer step. ``numbers``: theirs in the batch.

    Returns their metrics, and which ranks' loss is not finite, "" if all are.
    """
    reported: list[Metrics] = []
    held: list[Metrics] = []
    total, held_total = 0.0, 0.0
    for micro, number in zip(micros, numbers, strict=False):
        _seed(context, number)
        loss, metrics = engine.run(objective.loss, micro, context)
        if isinstance(loss, HeldLoss):
            engine.hold(loss.held.loss, keep_graph=loss.now is not None)
            held_total += float(loss.held.loss.detach())
            held.append(loss.held.metrics)
            loss = loss.now
        if loss is not None:
            engine.backward(loss)
            total += float(loss.detach())
        reported.append(metrics)
    if isinstance(batch, Arriving):
        engine.release(batch.factor)
        total += held_total * batch.factor
        reported += [{name: value * batch.factor for name, value in metrics.items()} for metrics in held]
    losses = gather(total, context.world)  # every rank says the same, and none waits for one that is gone
    bad = [f"{loss} on rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    return [*reported, {"loss/total": total}], f"the loss is {', '.join(bad)}" if bad else ""


def _mini_batches(
    engine: TrainingEngine, objective: Objective, batch: Any, context: StepContext
) -> Sequence[Iterable[Any]]:
    """The micro-batches of each optimizer step. A batch that is still arriving is one step."""
    if isinstance(batch, Arriving):
        return [_arriving(engine, objective, batch, context)]
    mini_batches = objective.mini_batches(_prepared(engine, objective, batch, context, "prepare"))
    _check_same_count([len(micros) for micros in mini_batches], context)
    return mini_batches


def _arriving(engine: TrainingEngine, objective: Objective, batch: Arriving, context: StepContext) -> Iterator[Any]:
    """The micro-batches of each piece, when it comes."""
    for number, piece in enumerate(batch.pieces):
        micros = _prepared(engine, objective, piece, context, f"prepare {number}")
        _check_same_count([len(micros)], context)
        yield from micros


def _prepared(
    engine: TrainingEngine, objective: Objective, batch: Any, context: StepContext, part: str
) -> Sequence[Any]:
    _seed(context, part)
    with torch.no_grad():
        micros: Sequence[Any] = engine.run(objective.prepare, batch, context)
    return micros


def reduce_metrics(reported: Iterable[Metrics], world: int) -> dict[str, float]:
    """Combine the metrics of all micro-batches and ranks by name: mean, maximum (``*_max``) or sum (``*_sum``)."""
    mine: dict[str, list[float]] = {}
    for metrics in reported:
        for key, value in metrics.items():
            mine.setdefault(key, []).append(float(value))
    merged: dict[str, list[float]] = {}
    for metrics_of_rank in gather(mine, world):
        for key, values in metrics_of_rank.items():
            merged.setdefault(key, []).extend(values)
    return {key: _reduce(key, values) for key, values in merged.items()}


def _reduce(key: str, values: list[float]) -> float:
    if key.endswith("_max"):
        return max(values)
    return sum(values) if key.endswith("_sum") else sum(values) / len(values)


def _shown(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """The few numbers of a console line: rewards, KL, clipping and phases in rl, otherwise loss and speed."""
    if "time/rollout_s" not in metrics:
        shown: dict[str, float | str] = {"loss": metrics["loss/total"], "grad": metrics["train/grad_norm"]}
        if "throughput/images_per_s" in metrics:
            shown["images/s"] = metrics["throughput/images_per_s"]
        return shown | _skipped(metrics)
    shown = {"reward": metrics.get("reward/total", math.nan)}
    rewards = sorted(key for key in metrics if key.startswith("reward/") and key != "reward/total")
    shown |= {key.removeprefix("reward/"): metrics[key] for key in rewards}
    if "reward_held_out/total" in metrics:
        shown["held out"] = metrics["reward_held_out/total"]
    shown |= {label: metrics[key] for key, label in _RL_FIGURES.items() if key in metrics}
    shown |= _skipped(metrics)
    return shown | {label: f"{metrics[key]:.1f} s" for key, label in _RL_PHASES.items() if key in metrics}


def _skipped(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Updates of the run that were left out, if there are any."""
    count = int(metrics["train/skipped_updates"])
    return {"skipped": str(count)} if count else {}


def _seed(context: StepContext, part: int | str) -> None:
    torch.manual_seed(stable_seed(context.seed, "global", context.step, context.rank, part))


def _check_same_count(mine: list[int], context: StepContext) -> None:
    """``mine``: micro-batches of each mini-batch."""
    counts = gather(mine, context.world)
    if not all(mine) or not mine or any(other != mine for other in counts):
        raise RuntimeError(f"step {context.step}: micro-batches by rank are {counts}; all need the same, at least 1")


def _restore(
    engine: TrainingEngine,
    ema: Ema | None,
    parts: Parts,
    checkpoints: CheckpointStore,
    resume: bool,
    context: WorkerContext,
) -> int:
    """Load the newest complete checkpoint if the run resumes. Returns the step to start with."""
    source, replayed = parts.source, parts.replayed
    manifest: Manifest | None = checkpoints.newest() if resume else None
    if manifest is None:
        if replayed and replayed.state:
            check_shards(replayed.state, context.rank, context.world)
            engine.load(replayed.state, replayed.steps.start * context.settings.algorithm.updates_per_batch)
            engine.skipped_in_a_row = 0  # it has counted the very step that is looked at
        if bad := engine.not_finite():
            raise UserError(f"model.weights: {bad} in {context.settings.model.weights} is not finite")
        return replayed.steps.start if replayed else 0
    checkpoints.load(manifest, engine, ema)
    read = itertools.chain(engine.pieces(), ema.pieces(engine) if ema else ())  # weights, moments, averages
    if bad := engine.not_finite(read):
        raise UserError(
            f"{checkpoints.path(manifest.step)}: {bad} is not finite; remove this folder to go on from the checkpoint "
            "before, then continue with --resume"
        )
    source.load_state_dict(manifest.source)
    source.load(checkpoints.path(manifest.step))
    context.say(
        f"resuming after step {manifest.step} of {context.settings.train.steps}, "
        f"written by {manifest.workers} worker(s) at ZeRO-{manifest.zero_stage}"
    )
    return manifest.step


def _export(engine: TrainingEngine, ema: Ema | None, run_folder: Path) -> None:
    """Write the component folder that the next stage reads, and the averaged weights beside it."""
    engine.export(run_folder / RESULT)
    if ema:
        engine.export(run_folder / AVERAGED, ema.full(engine))
