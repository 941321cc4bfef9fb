"""Saves the batch of a step whose update was left out, so that it can be looked at alone (``--train-only``)."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from actors.learner.checkpoints.background import in_one_line
from actors.learner.checkpoints.checkpoint_shards import ENGINE, write_shard
from actors.learner.checkpoints.checkpoint_store import REPLAY, STATE
from actors.learner.collectives import gather
from actors.learner.protocols import BatchSource, ShardedModel, StepContext
from deepgen.errors import UserError

KEPT = 3  # steps of a run: each takes as much disk as a checkpoint


def keep_failed(source: BatchSource, engine: ShardedModel | None, run_folder: Path, context: StepContext) -> str:
    """Write batch and state of a step into ``<run_folder>/replay/failed-step-000007``. Collective.

    ``engine``: holds the state that the step began with; None if that is lost, or not needed. Returns the rest of a
    sentence for the error, the same on all ranks; "" if the run has KEPT others. What cannot be written is part of it:
    the error matters more.
    """
    folder = run_folder / REPLAY / f"failed-step-{context.step:06d}"
    others = sum(other != folder for other in folder.parent.glob("failed-step-*"))
    if gather(others >= KEPT, context.world)[0]:
        return ""
    try:
        if context.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the same step, before a restart
        gather(None, context.world)
        (folder / STATE if engine else folder).mkdir(parents=True, exist_ok=True)
        note = source.keep(folder, context.step)
        if note and engine:
            write_shard(folder / STATE, ENGINE, engine.rank, engine.pieces())
    except (OSError, SafetensorError, UserError) as error:
        note = f"its batch cannot be saved: {in_one_line(error)}"
    notes = dict.fromkeys(said for said in gather(note, context.world) if said)
    if not notes and context.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other steps are in it
            folder.parent.rmdir()
    return "".join(f"; {said}" for said in notes)
