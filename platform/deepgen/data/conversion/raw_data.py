"""Reads users' data, in any of the forms below, as raw samples. Nothing is checked or decoded here.

| form        | what it is                                                                                          |
|-------------|-----------------------------------------------------------------------------------------------------|
| records     | our parquet (`deepgen.data.parquet`)                                                                |
| hf          | parquet of Hugging Face datasets: image structs {bytes, path}, text columns                         |
| webdataset  | tars; files of one sample share the name before the first dot: 07.jpg, 07.txt (or 07.json), and for |
|             | editing 07.source.jpg (or input, src) and 07.target.jpg (or output)                                 |
| captions    | JSON list, or a folder of them: {image, annotation}; the annotation's JSON file holds the caption   |
| blip3o      | JSON list: {type, txt, image or image_path}                                                         |
| edits       | JSON list: {input_image: [...], output_image, instruction}                                          |

The last three come from M2.6 (captions counts twice: list and folder). A `Unit` is the part of the raw data that one
process converts at a time. The same data and settings always give the same units.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepgen.data.conversion.columnar import parquet_schema, read_parquet, row_groups
from deepgen.data.conversion.raw_sample import RawData, RawSample, Unit
from deepgen.data.conversion.row_forms import entry_row
from deepgen.data.conversion.tars import read_tar
from deepgen.errors import UserError

FORMS = ("records", "hf", "webdataset", "captions", "blip3o", "edits")
FILE_SUFFIX = {"records": ".parquet", "hf": ".parquet", "webdataset": ".tar"}  # all other forms: .json


# ---------------------------------------------------------------- what form it is


def guess_form(path: Path) -> str:
    """The form of the data, one of FORMS. Raises UserError saying what was found if the form is unclear."""
    files = _files(path)
    kinds = Counter(file.suffix.lower() for file in files)
    if len(kinds) > 1:
        seen = " and ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
        raise UserError(f"{path}: holds {seen}; say --form (one of {', '.join(FORMS)}) or name the file")
    suffix = next(iter(kinds), "")
    if suffix == ".tar":
        return "webdataset"
    if suffix == ".parquet":
        names = set(parquet_schema(files[0]).names)
        return "records" if {"task", "prompt", "references"} <= names else "hf"
    if suffix == ".json":
        first = next(iter(_json_list(files[0], path)), None)
        if isinstance(first, dict):
            for key, form in (("annotation", "captions"), ("txt", "blip3o"), ("input_image", "edits")):
                if key in first:
                    return form
        raise UserError(f"{files[0]}: a list of unknown form; give --form (one of {', '.join(FORMS)})")
    raise UserError(f"{path}: no .parquet, .tar or .json in it")


def _files(path: Path, suffixes: Sequence[str] = (".parquet", ".tar", ".json")) -> list[Path]:
    """A folder's files with one of the suffixes, at any depth. If `path` is a file: that file, whatever its name."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and not file.is_dir())


# ---------------------------------------------------------------- units


def plan_units(raw: RawData, rows: int) -> list[Unit]:
    """Split the raw data into units of about `rows` samples (a tar is one unit, a parquet row group is never split)."""
    parts: list[tuple[str, int, int, tuple[Any, ...]]] = []
    suffix = FILE_SUFFIX.get(raw.form, ".json")
    for file in _files(raw.path, [suffix]):
        if raw.form == "webdataset":
            parts.append((str(file), 0, 0, ()))
        elif raw.form in ("records", "hf"):
            parts += [(str(file), first, last, ()) for first, last in row_groups(file, rows)]
        else:
            entries = _json_list(file, raw.path)
            starts = range(0, len(entries), rows)
            parts += [(str(file), s, min(s + rows, len(entries)), tuple(entries[s : s + rows])) for s in starts]
    if not parts:
        raise UserError(f"{raw.path}: nothing to convert in it (form {raw.form}: no samples in {suffix} files)")
    return [Unit(number, *part) for number, part in enumerate(parts)]


def _json_list(file: Path, given: Path) -> list[Any]:
    """The JSON list in a file. `given`: the user's path, which is this file or its folder."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, list):
        hint = "" if given == file else "; where lists and annotations share a folder, give the list's file as SOURCE"
        raise UserError(f"{file}: holds a {type(content).__name__}; expected a list{hint}")
    return content


# ---------------------------------------------------------------- samples


def read_unit(raw: RawData, unit: Unit) -> Iterator[RawSample]:
    """The samples of a unit. Absent parts are None; no sample is skipped."""
    if raw.form == "webdataset":
        yield from read_tar(raw, Path(unit.file))
    elif raw.form in ("records", "hf"):
        yield from read_parquet(raw, unit)
    else:
        for row, entry in enumerate(unit.entries, start=unit.first + 1):
            yield entry_row(raw, Path(unit.file), row, entry)
