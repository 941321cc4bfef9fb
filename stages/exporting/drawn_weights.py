"""The component folder to draw with, whatever of a run is given."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepgen.config import UserError
from deepgen.errors import writing
from deepgen.file_lock import lock
from stages.exporting.export_run import find_source, is_checkpoint, read_checkpoint


@contextmanager
def component_folder(given: Path, out: Path, *, averages: bool, base: Path | None) -> Iterator[Path]:
    """A component folder with these weights. One made of a checkpoint lies beside `out` until the end.

    base: where the checkpoint's model.weights lie now; None if they have not moved.

    Raises UserError if there are no weights to draw with.
    """
    if not given.is_dir():
        raise UserError(
            f"--weights: {given} is no folder; allowed: a component folder, a run or one of its checkpoints"
        )
    source = find_source(given, averages=averages)
    if not is_checkpoint(source):
        if not (source / "bridge").is_dir():
            raise UserError(
                f"--weights: {source} is no component folder (no bridge/); make one: python stages/export.py {source} "
                "OUT"
            )
        yield source
        return
    from deepgen.models.weights_io import layout_writer

    found = read_checkpoint(source, base, averages=averages)
    bases = layout_writer.Bases(found.base)
    weights = layout_writer.complete(found.trained, bases, without_lora=False)
    architecture = layout_writer.find_architecture(weights, bases, found.preset)
    with _folder_beside(out.absolute()) as folder:
        layout_writer.write(weights, architecture, bases, "components", folder / "weights", "keep")
        yield folder / "weights"


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder for as long as the context. Those of processes that were killed are removed.

    The process holds a lock on its folder, which ends with it.
    """
    prefix = f".{out.name}.weights-"
    with writing("the weights", out.parent, "run the same command again", "--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        for older in out.parent.glob(f"{prefix}*"):
            with _locked(older) as alone:
                if alone:
                    shutil.rmtree(older)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder. Whether nobody else has it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        yield lock(number)
    finally:
        os.close(number)
