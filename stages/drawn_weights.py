"""The component folder to draw with, whatever of a run is given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepgen.config import UserError
from stages.export_run import find_source, is_checkpoint, read_checkpoint


@contextmanager
def component_folder(given: Path, out: Path, *, averages: bool) -> Iterator[Path]:
    """A component folder with these weights. One made of a checkpoint lies beside `out` until the end.

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

    found = read_checkpoint(source, None, averages=averages)
    bases = layout_writer.Bases(found.base)
    weights = layout_writer.complete(found.trained, bases, without_lora=False)
    architecture = layout_writer.find_architecture(weights, bases, found.preset)
    folder = out.with_name(f".{out.name}.weights")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        layout_writer.write(weights, architecture, bases, "components", folder, "keep")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
