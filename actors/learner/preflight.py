"""Checks that run on the driver before Ray starts, and the preparation of the run folder.

An error found here costs seconds. Found by an actor, the same error costs the start of a cluster.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.experience.journal.group_journal import GIB
from actors.experience.journal.origin import JOURNAL
from actors.learner.checkpoints.checkpoint_store import RESULT, SPARE_BYTES, CheckpointStore, megabytes
from deepgen.config import Settings, UserError
from deepgen.data.usable import JUDGED
from deepgen.models.presets import check_width
from deepgen.models.stage_parts import TRAINED_PARTS
from deepgen.tracking.tracker import check_tracking


def prepare_run(settings: Settings, stage: str) -> Settings:
    """Check what can be checked before the start and make the run folder. Returns settings with weights resolved.

    Raises UserError if a folder is not writable, the disk is too small, MLflow's server does not answer, the
    checkpoint to resume from does not fit, or an input lies in the folder of an older run that `own_folder`
    would rename.
    """
    weights = resolve_weights(Path(settings.model.weights))
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"weights": weights})})
    check_width(settings.model.preset, weights)
    folder, store = settings.run.folder, CheckpointStore(settings, stage)
    if settings.run.resume:
        _check_resume(store, settings)
    elif store.folder.exists():
        _check_inputs_elsewhere(settings)
    check_tracking(settings)
    _check_writable(folder)
    if settings.data.cache_dir:
        _check_cache_folder(Path(settings.data.cache_dir))
    _check_space(folder, settings, stage)
    return settings


@contextmanager
def own_folder(settings: Settings) -> Iterator[None]:
    """Keep a new run out of an older run's folder: one with checkpoints is renamed to ``<name>.1`` (.2, ...).

    If the start fails inside this context, the older run gets its folder back.
    """
    folder = settings.run.folder
    if settings.run.resume:
        yield
        return
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        for judged in folder.glob(f"*{JUDGED}"):  # left by a failed start; bad records may be repaired by now
            judged.unlink()
        yield
        return
    kept = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    folder.rename(kept)
    folder.mkdir()
    try:
        yield
    except BaseException:  # including Ctrl-C
        shutil.rmtree(folder)
        kept.rename(folder)
        raise
    print(f"an earlier run of this name is kept as {kept}", flush=True)


def _check_inputs_elsewhere(settings: Settings) -> None:
    """Raise UserError if an input lies in the folder that the new run would rename."""
    folder, data = settings.run.folder.resolve(), settings.data
    inputs: dict[str, Path | str] = {"model.weights": settings.model.weights, "data.cache_dir": data.cache_dir}
    inputs |= {f"data.{key}": getattr(data, key) for key in ("train", "prompts", "heldout")}
    for key, path in inputs.items():
        if str(path) and Path(path).resolve().is_relative_to(folder):
            raise UserError(
                f"{key}: {path} lies in the folder of run {settings.run.name!r}, which a new run of this name puts "
                "aside; allowed: another run.name, or --resume to continue that run"
            )


def _check_resume(store: CheckpointStore, settings: Settings) -> None:
    """Raise UserError if the newest checkpoint does not fit. Without one, a scheduler's first start is no mistake."""
    manifest = store.newest()
    if manifest is not None:
        store.check_fits(manifest)
    elif store.run_folder.is_dir():
        print(f"{store.run_folder} has no complete checkpoint yet: starting from step 0", flush=True)
    else:
        print(f"there is no run {settings.run.name!r} in {settings.run.dir} yet: starting from step 0", flush=True)


def resolve_weights(path: Path) -> Path:
    """The component folder of ``path``: ``path`` itself, or the result of the finished run in that folder."""
    if (path / "transformer").is_dir():
        return path
    if (path / RESULT / "transformer").is_dir():
        return path / RESULT
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"model.weights: the run {path} has not finished; finish it with --resume, or write its newest "
            "checkpoint with stages/export.py"
        )
    raise UserError(f"model.weights: {path} is not a component folder (it has no transformer/) and not a finished run")


def _check_writable(folder: Path) -> None:
    try:
        _probe(folder)
    except OSError as error:
        raise UserError(f"run.dir: cannot write the run folder {folder}: {error.strerror or error}") from error


def _check_cache_folder(folder: Path) -> None:
    try:
        _probe(folder)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: got {str(folder)!r}, which cannot be written ({error.strerror or error}); allowed: a "
            "folder to write to, or empty for none"
        ) from error


def _probe(folder: Path) -> None:
    """Make a folder and write a file into it. Raises OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_bytes(b"\0" * 4096)
    probe.unlink()


def _check_space(folder: Path, settings: Settings, stage: str) -> None:
    """Raise UserError if the disk lacks room for the result and the checkpoints (weights and two moments in fp32).

    The sizes are estimated from the weight files.
    """
    weights = Path(settings.model.weights)
    trained = sum(_folder_bytes(weights / part) for part in TRAINED_PARTS[stage])
    count = min(settings.train.keep_checkpoints, settings.train.steps // settings.train.checkpoint_every + 1) + 1
    copies = 3 + (settings.experience.max_staleness if stage == "rl" else 0)
    journal = settings.experience.journal * GIB if stage == "rl" else 0
    needed = copies * trained * count + _folder_bytes(weights) + journal + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    parts = f"{count} checkpoints and the result{', experience.journal' if journal else ''}"
    if free < needed:
        raise UserError(
            f"run.dir: {folder} has {megabytes(free)} free, this run needs about {megabytes(needed)} ({parts}); "
            "make room, lower train.keep_checkpoints or choose another run.dir"
        )


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
