"""Checkpoints of a run: copied, written aside behind the next steps, flushed to disk, then renamed.

A folder with a manifest is complete.

    <run folder>/checkpoints/step-000050/engine-0.safetensors     weights and AdamW's moments that rank 0 updates; ...
                                         ema-0.safetensors        averages that rank 0 holds
                                         manifest.json            written last: step, settings, source state, files
    <run folder>/checkpoints/.writing-…                           interrupted; never read; the next save removes it

A run can continue from a checkpoint with any number of workers and any ZeRO stage (``checkpoint_shards``). Random
generators are not saved: the learner seeds them for every micro-batch. Frozen weights are not saved either: the
manifest has a fingerprint of the folder they come from, which is checked on resume.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepgen.config.settings import shown_settings
from deepgen.errors import UserError
from deepgen.fingerprint import fingerprint

if TYPE_CHECKING:
    from actors.learner.checkpoints.background import Background
    from actors.learner.protocols import SavedBeside, ShardedModel
    from deepgen.config.settings import Settings

MANIFEST = "manifest.json"
RESULT, AVERAGED = "model", "model-ema"  # folders of a finished run: the weights, and their averages if it keeps any
REPLAY, STATE = "replay", "state"  # folder of a run for steps to replay; the state that such a step began with
FORMAT = 4
_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "diffusers", "peft")
_NAME = re.compile(r"step-(\d{6,})")
SPARE_BYTES = 16 << 20  # bytes kept free beside a checkpoint, for journal and images


@dataclass(frozen=True)
class Manifest:
    """Describes a checkpoint. ``step`` batches are done; ``files`` maps file names to sizes in bytes."""

    format: int
    step: int
    stage: str
    preset: str
    workers: int
    zero_stage: int
    ema: bool
    attempt: str
    weights: str
    settings: dict[str, Any]
    versions: dict[str, str]
    source: dict[str, Any]
    files: dict[str, int]


class CheckpointStore:
    """The checkpoints of a run folder. ``attempt`` identifies this start.

    ``save``, ``finish`` and ``load`` are collective. At most one checkpoint is under way.
    """

    def __init__(self, settings: Settings, stage: str, attempt: str = "") -> None:
        self.run_folder = settings.run.folder
        self.folder = self.run_folder / "checkpoints"
        self._settings, self._stage, self.attempt = settings, stage, attempt
        self._fingerprint = ""
        self._background: Background | None = None  # from the first `save` on: it needs torch, a driver does not

    def newest(self, until: int | None = None) -> Manifest | None:
        """Manifest of the newest complete checkpoint, of step `until` at most, or None."""
        found = newest_checkpoint(self.folder, until)
        return found and found[1]

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def check_fits(self, manifest: Manifest) -> None:
        """Raise UserError if the checkpoint cannot continue the run with its present settings."""
        settings, where = self._settings, self.path(manifest.step)
        then = manifest.settings
        lora_alpha = settings.model.lora_alpha if self._stage == "sft" and settings.model.lora_rank else 0
        pairs: list[tuple[str, Any, Any]] = [
            ("stage", self._stage, manifest.stage),
            ("model.preset", settings.model.preset, manifest.preset),
            ("model.padding", settings.model.padding, then["model"].get("padding")),
            ("model.lora_rank", settings.model.lora_rank if self._stage == "sft" else 0, _lora(manifest, "lora_rank")),
            ("model.lora_alpha", lora_alpha, _lora(manifest, "lora_alpha") if lora_alpha else 0),
            ("train.ema_decay", "0" if not settings.train.ema_decay else "above 0", "above 0" if manifest.ema else "0"),
            ("run.seed", settings.run.seed, then["run"].get("seed")),
            # In rl the checkpoint holds the policy versions that the next steps are drawn with.
            ("experience.max_staleness", self._staleness(), _staleness(manifest)),
            # AdamW's count of steps follows from the step and this setting.
            ("algorithm.updates_per_batch", self._updates(), _updates(manifest)),
            # The position in each data source follows from the common position and these two settings.
            ("data.temperature", settings.data.temperature, then["data"].get("temperature")),
            ("data.weights", settings.data.weights, then["data"].get("weights")),
        ]
        for key, given, allowed in pairs:
            if given != allowed:
                raise UserError(
                    f"{key}: got {given}; allowed: {allowed}, with which the checkpoint {where} was written"
                )
        if manifest.step > settings.train.steps:
            raise UserError(
                f"train.steps: got {settings.train.steps}; allowed: {manifest.step} or more, as {where} has"
            )
        if manifest.weights != self._weights_fingerprint():
            raise UserError(
                f"model.weights: {settings.model.weights} is not what the checkpoint {where} was trained from "
                f"({then['model'].get('weights')}, or the folder has changed)"
            )

    def save(
        self,
        step: int,
        engine: ShardedModel,
        ema: SavedBeside | None,
        source: dict[str, Any],
        write_more: Callable[[Path], None] | None = None,
        needed: frozenset[int] = frozenset(),
    ) -> None:
        """Copy the state after ``step`` steps; a thread writes the checkpoint and removes the oldest.

        ``source``: state of the batch source, as JSON. ``write_more``: rank 0's thread writes the rest of it with that.
        ``needed``: steps of which the newest checkpoint until then is kept, too.
        Raises UserError on all ranks if there is no room, or if the checkpoint before could not be written.
        """
        from actors.learner.checkpoints.background import Background, Place, fail_together
        from actors.learner.checkpoints.checkpoint_shards import AVERAGES, ENGINE

        self._background = self._background or Background()
        self._background.finish()
        unfinished, failure = self.folder / f".writing-{self.path(step).name}", None
        try:
            if engine.rank == 0:
                self._make_room(unfinished, engine, ema)
        except OSError as error:
            failure = error
        what = f"the checkpoint of step {step} to {self.folder}"
        fail_together(failure, engine.world, what)
        shards = {ENGINE: engine.pieces(), AVERAGES: ema.pieces(engine) if ema else ()}
        complete = partial(self._complete, unfinished, step, ema is not None, copy.deepcopy(source), needed)
        self._background.start(what, Place(unfinished, engine.rank, engine.world), shards, write_more, complete)

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete. Raises UserError on all ranks if it cannot be written."""
        if self._background:
            self._background.finish()

    def close(self, say: Callable[[str], None]) -> None:
        """Wait for the checkpoint under way after another error: nothing is raised or exchanged, see `Background`."""
        if self._background:
            self._background.close(say)

    def load(self, manifest: Manifest, engine: ShardedModel, ema: SavedBeside | None) -> None:
        """Load the checkpoint into the engine and the averages. Raises UserError if it does not fit."""
        self.check_fits(manifest)
        check_shards(self.path(manifest.step), engine.rank, engine.world)
        engine.load(self.path(manifest.step), manifest.step * self._updates())
        if ema:
            ema.load(self.path(manifest.step), engine)

    def _make_room(self, unfinished: Path, engine: ShardedModel, ema: SavedBeside | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        # The weights, AdamW's two moments, the averages, earlier versions of the weights; all fp32.
        copies = (4 if ema else 3) + self._staleness()
        needed = copies * 4 * sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.parameters)
        free = shutil.disk_usage(self.folder).free
        if free < needed + SPARE_BYTES:
            raise OSError(f"{megabytes(free)} free, {megabytes(needed + SPARE_BYTES)} needed")
        unfinished.mkdir()

    def _complete(
        self,
        unfinished: Path,
        step: int,
        has_ema: bool,
        source: dict[str, Any],
        needed: frozenset[int],
        listed: dict[str, int],
    ) -> None:
        """Write the manifest and rename the folder. ``listed``: sizes of the ranks' files; rank 0 may have more."""
        from actors.learner.checkpoints.checkpoint_shards import flush

        here = [file for file in sorted(unfinished.rglob("*")) if file.is_file()]
        sizes = {str(file.relative_to(unfinished)): file.stat().st_size for file in here} | listed
        settings = self._settings
        manifest = Manifest(
            format=FORMAT,
            step=step,
            stage=self._stage,
            preset=settings.model.preset,
            workers=settings.train.workers,
            zero_stage=settings.train.zero_stage,
            ema=has_ema,
            attempt=self.attempt,
            weights=self._weights_fingerprint(),
            settings=shown_settings(settings),  # `check_fits` compares none that could hold a secret
            versions={package: version(package) for package in _PACKAGES},
            source=source,
            files=sizes,
        )
        (unfinished / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        for entry in [unfinished / MANIFEST, *{file.parent for file in here}, unfinished]:
            flush(entry)  # the files were flushed by those who wrote them
        final = self.path(step)
        if final.exists():
            shutil.rmtree(final)  # a damaged checkpoint, or the same step written before a restart
        unfinished.rename(final)
        flush(self.folder)
        self._prune(step, needed)

    def set_aside(self, newest: int) -> None:
        """Rename checkpoints of later steps than this `unused-…`, so that none resumes from them. For rank 0."""
        for step, folder in _steps(self.folder):
            if step > newest:
                aside = folder.with_name(f"unused-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)

    def _prune(self, newest: int, needed: frozenset[int]) -> None:
        """Keep the newest complete checkpoints, and the newest until each of these steps. Later ones are set aside.

        Such a later checkpoint is damaged, or the run would have resumed from it.
        """
        self.set_aside(newest)
        found = _steps(self.folder)
        complete = [step for step, folder in found if _is_complete(folder, _read_manifest(folder), step)]
        kept = set(complete[-self._settings.train.keep_checkpoints :])
        kept |= {max((step for step in complete if step <= wanted), default=newest) for wanted in needed}
        for step, folder in found:
            if step <= newest and step not in kept:
                shutil.rmtree(folder)

    def _staleness(self) -> int:
        return self._settings.experience.max_staleness if self._stage == "rl" else 0

    def _updates(self) -> int:
        return self._settings.algorithm.updates_per_batch if self._stage == "rl" else 1

    def _weights_fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = fingerprint(Path(self._settings.model.weights))
        return self._fingerprint


def newest_checkpoint(folder: Path, until: int | None = None) -> tuple[Path, Manifest] | None:
    """The newest complete one in a run's folder of checkpoints, of step `until` at most.

    Those with short or missing files are skipped.
    """
    for step, path in reversed([(step, path) for step, path in _steps(folder) if until is None or step <= until]):
        content = _known_manifest(path)
        if _is_complete(path, content, step):
            return path, Manifest(**content)
    return None


def complete_checkpoint(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder, whatever its name. Raises UserError if it is not complete."""
    content = _known_manifest(folder)
    if not _is_complete(folder, content, content.get("step")):
        raise UserError(
            f"{folder}: not a complete checkpoint; {MANIFEST}, which is written last, or a file that it lists is "
            "missing, cut off or damaged"
        )
    return Manifest(**content)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every folder named like a checkpoint, in order. Other folders are ignored."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def check_shards(folder: Path, rank: int, world: int) -> None:
    """Raise UserError on all ranks if a file has changed since it was written. Collective: one rank reads each file."""
    from actors.learner.checkpoints.checkpoint_shards import is_as_written
    from actors.learner.collectives import gather

    files = sorted(folder.glob("*.safetensors"))
    mine = [file.name for file in files[rank::world] if not is_as_written(file)]
    changed = sorted(name for names in gather(mine, world) for name in names)
    if changed:
        raise UserError(
            f"{folder / changed[0]}: has changed since it was written; remove its folder to go on from the checkpoint "
            "before, then continue with --resume"
        )


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Content of a checkpoint's manifest; {} if it is missing or damaged."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _known_manifest(folder: Path) -> dict[str, Any]:
    """Like `_read_manifest`. Raises UserError for another format."""
    content = _read_manifest(folder)
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{folder / MANIFEST}: checkpoint format {content['format']}; allowed: {FORMAT}")
    return content


def _is_complete(folder: Path, content: dict[str, Any], step: object) -> bool:
    """Whether a folder holds the checkpoint that its name says, with all files at full length."""
    if content.keys() != {field.name for field in fields(Manifest)} or content["step"] != step:
        return False
    sections = content["settings"]
    if not isinstance(content["files"], dict) or not content["files"] or not isinstance(sections, dict):
        return False
    if not all(isinstance(sections.get(name), dict) for name in ("model", "run", "data")):
        return False
    return all(_size(folder / name) == size for name, size in content["files"].items())


def _lora(manifest: Manifest, key: str) -> Any:
    return manifest.settings["model"].get(key) if manifest.stage == "sft" else 0


def _staleness(manifest: Manifest) -> Any:
    return manifest.settings.get("experience", {}).get("max_staleness") if manifest.stage == "rl" else 0


def _updates(manifest: Manifest) -> Any:
    # Checkpoints from before there was the setting have one update a batch.
    return manifest.settings.get("algorithm", {}).get("updates_per_batch", 1) if manifest.stage == "rl" else 1


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1
