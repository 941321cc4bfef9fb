"""Builds the parts that each stage gives to the learner's loop, inside each learner worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.learner.protocols import Parts, WorkerContext
from actors.objectives.experience_source import ExperienceSource
from actors.objectives.flow_matching import FlowMatching
from actors.objectives.heldout_loss import Heldout
from actors.objectives.mr_grpo import MRGRPO
from actors.objectives.observer import Observer
from actors.objectives.record_source import MixtureSource, open_training_set, size_note
from actors.objectives.replay_files import find_steps
from actors.objectives.replay_source import ReplaySource
from deepgen.config.settings import TASKS
from deepgen.data.loading.mixture import Mixture


def build_flow_matching(context: WorkerContext) -> Parts:
    """The parts of pretrain and sft."""
    settings, data = context.settings, open_training_set(context)
    mixture = Mixture.from_settings(settings, data.store, settings.data.micro_batch)
    edits = int((data.store.tasks == TASKS.index("edit")).sum())
    context.say(f"{len(data) - edits} generation and {edits} editing records, {size_note(mixture)}")
    objective = FlowMatching.for_worker(context)
    source = MixtureSource(data, mixture, objective.cache, objective.quarantine, settings.data.threads)
    return Parts(source, objective, Heldout(context, objective))


def build_rl(context: WorkerContext, stream: Any) -> Parts:
    """The parts of rl; `stream` is the handle of the experience stream."""
    auxiliary = FlowMatching.for_worker(context) if context.settings.algorithm.sft_coef else None
    records = auxiliary_records(context, auxiliary) if auxiliary else None
    observer = Observer(context, stream, context.tracker) if context.tracker else None
    context.say(context.settings.overlap().why)
    return Parts(ExperienceSource(context, stream, records), MRGRPO.for_worker(context, auxiliary), observer)


def build_replay(context: WorkerContext, folder: Path) -> Parts:
    """The parts of rl on the recorded steps in a folder, without rollout actors and rewards."""
    auxiliary = FlowMatching.for_worker(context) if context.settings.algorithm.sft_coef else None
    records = auxiliary_records(context, auxiliary) if auxiliary else None
    found = find_steps(folder)
    context.say(f"training on the steps {found.steps.start} to {found.steps.stop - 1} of {folder}")
    source, objective = ReplaySource(context, folder, records), MRGRPO.for_worker(context, auxiliary)
    return Parts(source, objective, None, found)


def auxiliary_records(context: WorkerContext, objective: FlowMatching) -> MixtureSource:
    """The training records of the auxiliary loss, in the same edit:T2I cycle as in the other stages (M2.4)."""
    settings, data = context.settings, open_training_set(context)
    size = max(1, settings.algorithm.sft_batch // (settings.data.edit_per_cycle + settings.data.t2i_per_cycle))
    mixture = Mixture.from_settings(settings, data.store, size)
    context.say(f"{len(data)} records for the auxiliary loss, {size_note(mixture)}")
    return MixtureSource(data, mixture, objective.cache, objective.quarantine, settings.data.threads)
