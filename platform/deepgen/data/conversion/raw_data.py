"""Reads users' data, in any of the forms below, as raw samples. Nothing is checked or decoded here.

| form       | what it is                                                                                          |
|------------|-----------------------------------------------------------------------------------------------------|
| records    | our records (`deepgen.data.parquet`), in parquet, Arrow, JSON, JSON lines or CSV                     |
| hf         | parquet or Arrow of Hugging Face datasets: image structs {bytes, path}, text columns                |
| webdataset | tars; files of one sample share the name before the first dot: 07.jpg, 07.txt (or 07.json), and for |
|            | editing 07.source.jpg (or input, src) and 07.target.jpg (or output); in any order                   |
| folder     | pictures with captions beside them: 07.jpg, 07.txt (or 07.caption, 07.json)                         |
| pairs      | a table with a column of images and one of texts, such as metadata.jsonl or .csv beside pictures    |
| captions   | a table: {image, annotation}; the annotation's JSON file holds the caption                          |
| blip3o     | a table: {type, txt, image or image_path}                                                           |
| edits      | a table: {input_image: [...], output_image, instruction}                                            |
| prompts    | prompts without images: one a line of text, a table, or records                                     |

A table is a JSON list, JSON lines, CSV or TSV, gzipped or not (`deepgen.reading.tables`). captions, blip3o and edits
come from M2.6 (captions counts twice: list and folder). A `Unit` is the part of the raw data that one process converts
at a time. The same data and settings always give the same units.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgen.data.conversion.readers.columnar import column_names, is_prompts, parts_of, read_columnar
from deepgen.data.conversion.readers.picture_folder import picture_sample
from deepgen.data.conversion.readers.raw_sample import RawData, RawSample, Unit, stem_of
from deepgen.data.conversion.readers.row_forms import columns_of, form_of, is_row, listed, sample_of
from deepgen.data.conversion.readers.source_files import (
    ARROW,
    PARQUET,
    PICTURE,
    TAR,
    TEXT,
    Found,
    captions_of,
    find_files,
    kind_of,
    side_files_of,
)
from deepgen.data.conversion.readers.tars import read_tar
from deepgen.errors import UserError
from deepgen.reading.tables import TABLES, Unreadable, read_table

_COLUMNAR = (PARQUET, ARROW)
# The kinds of files of each form (`source_files.kind_of`).
FORMS: dict[str, tuple[str, ...]] = {
    "records": (*_COLUMNAR, *TABLES),
    "hf": _COLUMNAR,
    "webdataset": (TAR,),
    "folder": (PICTURE,),
    "pairs": TABLES,
    "captions": TABLES,
    "blip3o": TABLES,
    "edits": TABLES,
    "prompts": (TEXT, *TABLES, *_COLUMNAR),
}
_TAKEN = ".parquet, .arrow, .tar (also .tar.gz, .bz2, .xz), .json, .jsonl, .csv, .tsv (also .gz), .txt, or pictures"


# ---------------------------------------------------------------- what form it is


def guess_form(path: Path) -> str:
    """The form of the data, one of FORMS. Raises UserError saying what was found if the form is unclear."""
    files = _telling(find_files(path).files)
    kinds = Counter(map(kind_of, files))
    if len(kinds) > 1:
        seen = " and ".join(f"{count} {_suffix(kind)}" for kind, count in kinds.most_common())
        raise UserError(f"{path}: holds {seen}; say --form (one of {', '.join(FORMS)}) or name the file")
    kind = next(iter(kinds), "")
    if kind == TAR:
        return "webdataset"
    if kind in _COLUMNAR:
        return _columnar_form(files[0])
    if kind in TABLES:
        row = _first_row(files[0])
        if form := form_of(row):
            return form
        seen = f"has the keys {listed(row)}" if isinstance(row, Mapping) else "has no row that can be read"
        raise UserError(f"{files[0]}: a list of unknown form ({seen}); {_hint(row)}")
    if kind in (TEXT, PICTURE):
        return "prompts" if kind == TEXT else "folder"
    raise UserError(f"{path}: nothing in it that can be read; allowed: {_TAKEN}")


def _telling(files: list[Path]) -> list[Path]:
    """The files that tell the form: archives and tables, not what belongs to them or to pictures, nor pictures."""
    beside = captions_of(files) | side_files_of(files)
    own = [file for file in files if file not in beside]
    for kinds in ((TAR, *_COLUMNAR, *TABLES), (PICTURE,), (TEXT,)):
        if found := [file for file in own if kind_of(file) in kinds]:
            return found
    return own


def _hint(row: Any) -> str:
    if isinstance(row, Mapping) and is_row(row):
        return "is its header missing? The first row has to name the columns, as in image,caption"
    pairs = "of pictures with texts: --form pairs --column image=NAME --column prompt=NAME"
    return f"give --form (one of {', '.join(FORMS)}); {pairs}"


def _suffix(kind: str) -> str:
    return kind if kind.startswith(".") else f".{kind}"


def _columnar_form(file: Path) -> str:
    names = set(column_names(file))
    if {"task", "prompt", "references"} <= names:
        return "prompts" if is_prompts(file) else "records"
    return "hf"


def _first_row(file: Path) -> Any:
    """The first row of a table that can be read, None if there is none."""
    return next((row.value for row in read_table(file) if not isinstance(row.value, Unreadable)), None)


# ---------------------------------------------------------------- units


def source_files(raw: RawData) -> Found:
    """The files to convert, and what is passed over. Raises UserError if the one given is of no kind of this form."""
    found, kinds = find_files(raw.path, FORMS[raw.form]), FORMS[raw.form]
    if raw.path.is_file() and (kind := kind_of(raw.path)) and kind not in kinds:
        taken = ", ".join(map(_suffix, kinds))
        raise UserError(f"--form: got {raw.form} for {raw.path}; allowed: files of {taken}")
    return found


def notes_of(raw: RawData, found: Found) -> list[str]:
    """Lines that say what is passed over, what is mixed, and which columns are read. found: its `source_files`.

    Raises UserError if it is unclear which columns these are.
    """
    notes = found.notes()
    if raw.form in ("hf", "pairs") and found.files:
        notes += _columns_note(raw, found.files[0])
    if (raw.path / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in raw.path.glob("*/dataset_info.json"))
        notes.append(f"its splits are converted together ({', '.join(splits)}); for one of them give its folder")
    return notes


def _columns_note(raw: RawData, file: Path) -> list[str]:
    names = column_names(file) if raw.form == "hf" else list(_first_row(file) or ())
    if not names:
        return []
    columns = columns_of(raw, names, file)
    others = [name for name in names if name and name not in columns.values()]
    read = ", ".join(f"{role} from {name!r}" for role, name in columns.items())
    return [f"reads {read}" + (f"; not read: {listed(others)}" if others else "")]


def plan_units(raw: RawData, rows: int, files: Sequence[Path]) -> list[Unit]:
    """Split the raw data into units of about `rows` samples (a tar is one unit, a parquet row group is never split).

    files: those of its `source_files`.
    """
    units: list[Unit] = []
    if raw.form == "folder":
        folder = raw.path if raw.path.is_dir() else raw.path.parent
        names = [file.relative_to(folder).as_posix() for file in files]
        for first in range(0, len(names), rows):
            some = tuple(names[first : first + rows])
            units.append(Unit(len(units), str(folder), first, first + len(some), entries=some))
    else:
        parts = (part for file in files for part in _parts(raw.form, file, rows))
        units = [Unit(number, file, first, last, offset) for number, (file, first, last, offset) in enumerate(parts)]
    if not units:
        taken = ", ".join(map(_suffix, FORMS[raw.form]))
        raise UserError(f"{raw.path}: nothing to convert in it (form {raw.form}: no samples in {taken} files)")
    return units


def _parts(form: str, file: Path, rows: int) -> Iterator[tuple[str, int, int, int]]:
    """Parts of a file, as in `Unit`: file, first, last, offset."""
    kind = kind_of(file)
    if form == "webdataset":
        yield str(file), 0, 0, 0
    elif form == "hf" or kind in _COLUMNAR:
        yield from ((str(file), first, last, 0) for first, last in parts_of(file, rows))
    else:
        first = offset = 0
        last, end, held = 0, 0, 0
        for row in read_table(file):
            last, end, held = row.number, row.end, held + 1
            if held == rows:
                yield str(file), first, last, offset
                first, offset, held = last, end, 0
        if held:
            yield str(file), first, last, offset


# ---------------------------------------------------------------- samples


def read_unit(raw: RawData, unit: Unit, until: float | None = None) -> Iterator[RawSample]:
    """The samples of a unit. Absent parts are None; no sample is skipped.

    until: time (monotonic) at which the search for the samples of a tar ends, whatever has been found; None: never.
    """
    file = Path(unit.file)
    if raw.form == "webdataset":
        yield from read_tar(raw, file, until)
    elif raw.form == "folder":
        yield from (picture_sample(raw, file, name) for name in unit.entries)
    elif raw.form == "hf" or kind_of(file) in _COLUMNAR:
        yield from read_columnar(raw, unit)
    else:
        yield from _read_rows(raw, unit, file)


def _read_rows(raw: RawData, unit: Unit, file: Path) -> Iterator[RawSample]:
    first = _first_row(file) if raw.form == "pairs" else None
    columns = columns_of(raw, first if isinstance(first, Mapping) else (), file) if raw.form == "pairs" else {}
    within = itertools.takewhile(lambda row: row.number <= unit.last, read_table(file, unit.offset, unit.first))
    for row in within:
        name, place = f"{stem_of(raw, file)}-{row.number}", f"{file}, row {row.number}"
        if isinstance(row.value, Unreadable):
            yield RawSample(name, raw.task, None, None, None, (), place, raw.name, fault=row.value.reason)
        else:
            yield sample_of(row.value, raw, file, name, place, columns)
