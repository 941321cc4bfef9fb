"""`stages/rl.py --status RUN`: what a run does, or where it ended, from the files in its folder. Needs no Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from actors.learner.checkpoints.checkpoint_store import CheckpointStore
from actors.learner.run_control import Holder, lock_holder
from deepgen.config import Settings, UserError
from deepgen.config.schema.paths import exists, given_path
from deepgen.errors import nearest
from deepgen.tracking.journal import FILE_NAME, Entry, read_entries
from deepgen.tracking.progress import format_duration, format_value
from deepgen.tracking.status import STATUS, Status, age, counts_text, rank_text, read_status

_SHOWN = 16  # busy actors
_OLD_S = 10.0  # a live run writes its status every two seconds


def show_status(settings: Settings, run: str) -> None:
    """Print the status of a run."""
    print(status_text(settings, run))


def status_text(settings: Settings, run: str) -> str:
    """The status of a run: a run.name in run.dir, or a run folder. Raises UserError if there is no such rl run."""
    folder = run_folder(settings, run)
    place = settings.run.model_copy(update={"name": folder.name, "dir": folder.parent})
    settings = settings.model_copy(update={"run": place})
    status, holder = read_status(folder), lock_holder(settings)
    if status is None:
        if holder is None or not holder.lives:
            raise UserError(f"--status: {folder} has no {STATUS}; allowed: the folder of an rl run that has begun")
        return f"{folder.name}: starting, {holder.who}; its experience stream is not there yet"
    metrics = folder / FILE_NAME
    entries = list(read_entries(metrics)) if metrics.exists() else []
    checkpoint = CheckpointStore(settings, "rl").newest()
    return describe(folder.name, status, holder, entries, checkpoint.step if checkpoint else None, time.time())


def run_folder(settings: Settings, run: str, option: str = "--status") -> Path:
    """The folder of a run: a run.name in run.dir, or a folder. Raises UserError, naming `option`, if there is none."""
    given = given_path(option, run)
    for folder in (settings.run.dir / given, given):
        if exists(folder) and folder.is_dir():
            return folder.resolve()
    runs = sorted(path.parent.name for path in settings.run.dir.glob(f"*/{STATUS}"))
    hint = nearest(run, runs) if runs else ""
    raise UserError(
        f"{option}: there is no run {run!r} in {settings.run.dir}; "
        f"allowed: {', '.join(runs) or 'a run.name with its run.dir=FOLDER'}, or a run folder{hint}"
    )


def describe(
    name: str, status: Status, holder: Holder | None, entries: Sequence[Entry], checkpoint: int | None, now: float
) -> str:
    """The text for a person. `entries`: the run's metrics; `checkpoint`: steps in the newest one; `now`: Unix time."""
    state, lives = _state(status, holder, now)
    if lives:
        status = replace(status, time=now)  # calls go on since the status was written
    lines = [f"{name}: {state}", "", *_progress(status, entries, checkpoint)]
    if not status.ended:
        lines += ["", *_work(status)]
    return "\n".join(lines)


def _state(status: Status, holder: Holder | None, now: float) -> tuple[str, bool]:
    """Whether the run lives, in words, and whether it does."""
    written = f"{format_duration(now - status.time)} ago"
    if holder is not None and holder.lives:
        if now - status.time > _OLD_S:
            return f"{holder.who} starts, ends or hangs: its status is old, written {written}", False
        return f"running, {holder.who}", True
    if status.ended:
        return f"ended {written}", False
    who = f", {holder.who}," if holder else ""
    return f"dead: its process{who} is gone without an end; as it was {written}", False


def _progress(status: Status, entries: Sequence[Entry], checkpoint: int | None) -> Iterator[str]:
    steps = [entry for entry in entries if "train/grad_norm" in entry.metrics]
    done = steps[-1].step if steps else 0
    yield f"step         {done} of {status.steps} done{_shown(steps)}"
    yield f"weights      {'none' if status.version is None else f'version {status.version}'} published last"
    yield f"checkpoint   {'none yet' if checkpoint is None else f'after step {checkpoint}'}"
    yield f"missing      {counts_text(status.missing)} scores since the start"
    yield f"restarts     {counts_text(status.restarts)}"
    if steps and "journal/groups_written" in steps[-1].metrics:
        yield f"journal      {_journal(steps[-1].metrics)}"


def _journal(metrics: Mapping[str, float]) -> str:
    written, read, skipped = (int(metrics[f"journal/{name}"]) for name in ("groups_written", "groups_read", "skipped"))
    size = f"{metrics['journal/bytes_written'] / 1e6:,.1f} MB"
    return f"{written} groups written ({size}), {read} read, {skipped} skipped"


def _shown(steps: Sequence[Entry]) -> str:
    rewards = {key: value for key, value in steps[-1].metrics.items() if key.startswith("reward/")} if steps else {}
    return "".join(f"  {key.removeprefix('reward/')} {format_value(value)}" for key, value in sorted(rewards.items()))


def _work(status: Status) -> Iterator[str]:
    for rank in status.learner:
        yield rank_text(rank, status)
    if not status.learner:
        yield "the learner has not asked for a batch yet"
    for step in status.under_way:
        yield f"step {step.step}: of {step.groups} groups {step.sampled} are sampled, {step.scored} scored"
    yield f"open requests: {counts_text(status.open_requests)}"
    yield f"busy: {len({call.actor for call in status.calls})} of {sum(status.actors.values())} actors"
    shown = status.calls[:_SHOWN]
    width = max((len(call.actor) for call in shown), default=0)
    for call in shown:
        yield f"  {call.actor:<{width}}  {age(call.since, status):>7}  {call.what}"
    if len(status.calls) > _SHOWN:
        yield f"  and {len(status.calls) - _SHOWN} more, which began later"
