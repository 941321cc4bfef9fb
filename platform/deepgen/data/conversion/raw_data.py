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

import codecs
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepgen.data.parquet import decoded_rows, require_regular
from deepgen.data.uris import UriError, absolute, reach_of, read_uri
from deepgen.errors import UserError
from deepgen.reading.reach import Reach

FORMS = ("records", "hf", "webdataset", "captions", "blip3o", "edits")
FILE_SUFFIX = {"records": ".parquet", "hf": ".parquet", "webdataset": ".tar"}  # all other forms: .json
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".png", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
_SOURCES, _TARGETS = ("source", "input", "src"), ("target", "output")  # prefixes of file names in tars of edits
HF_IMAGE, HF_TEXT = ("image", "jpg", "png", "webp"), ("caption", "text", "prompt", "txt", "instruction")


@dataclass(frozen=True)
class RawData:
    """The data to read and how.

    `columns` names the columns of `hf` (image, prompt, references). `name`: the data set's name for the column source;
    `records` keep their own. `allow`: what its files may name besides files under `path` (or its folder, if it is a
    file) and under `images`, and public addresses; as data.allow.
    """

    path: Path
    form: str
    task: str = "t2i"
    images: Path | None = None  # base folder of relative image paths; None: `path`, or its folder if it is a file
    caption_key: str = "caption"
    columns: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    allow: tuple[str, ...] = ()

    def reach(self) -> Reach:
        """What the data set may read."""
        return reach_of(self.path, self.allow, *([self.images] if self.images else []))


@dataclass(frozen=True)
class Unit:
    """Rows first..last-1 of one file (row groups of a parquet file). `entries`: the rows, if it is a JSON list."""

    number: int
    file: str
    first: int
    last: int
    entries: tuple[Any, ...] = ()


@dataclass(frozen=True)
class RawSample:
    """One sample as it was found, and its place.

    An image is encoded bytes, None if absent, or the error from reading it. `id` is unique in the data set, except in
    `records`, which bring their own ids. `fault`: why the files do not form a sample, as "kind: details".
    """

    id: str
    task: str
    prompt: Any
    answer: Any
    image: bytes | UriError | None
    references: tuple[bytes | UriError | None, ...]
    place: str
    source: str
    fault: str = ""


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
        names = set(_schema(files[0]).names)
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
    if not path.is_dir():
        require_regular([path])
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and not file.is_dir())
    require_regular(files)
    return files


# ---------------------------------------------------------------- units


def plan_units(raw: RawData, rows: int) -> list[Unit]:
    """Split the raw data into units of about `rows` samples (a tar is one unit, a parquet row group is never split)."""
    parts: list[tuple[str, int, int, tuple[Any, ...]]] = []
    suffix = FILE_SUFFIX.get(raw.form, ".json")
    for file in _files(raw.path, [suffix]):
        if raw.form == "webdataset":
            parts.append((str(file), 0, 0, ()))
        elif raw.form in ("records", "hf"):
            parts += [(str(file), first, last, ()) for first, last in _row_groups(file, rows)]
        else:
            entries = _json_list(file, raw.path)
            starts = range(0, len(entries), rows)
            parts += [(str(file), s, min(s + rows, len(entries)), tuple(entries[s : s + rows])) for s in starts]
    if not parts:
        raise UserError(f"{raw.path}: nothing to convert in it (form {raw.form}: no samples in {suffix} files)")
    return [Unit(number, *part) for number, part in enumerate(parts)]


def _row_groups(file: Path, rows: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of row groups with about `rows` rows each."""
    with _open_parquet(file) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    runs, first, count = [], 0, 0
    for i, size in enumerate(sizes):
        count += size
        if count >= rows or i + 1 == len(sizes):
            runs.append((first, i + 1))
            first, count = i + 1, 0
    return runs


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: can't be read as parquet ({' '.join(str(error).split())[:160]})") from error


def _schema(file: Path) -> pa.Schema:
    with _open_parquet(file) as parquet:
        return parquet.schema_arrow


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
        yield from _read_tar(raw, Path(unit.file))
    elif raw.form in ("records", "hf"):
        yield from _read_parquet(raw, unit)
    else:
        for row, entry in enumerate(unit.entries, start=unit.first + 1):
            yield _read_entry(raw, Path(unit.file), row, entry)


def _read_parquet(raw: RawData, unit: Unit) -> Iterator[RawSample]:
    file = Path(unit.file)
    with _open_parquet(file) as parquet:
        before = sum(parquet.metadata.row_group(i).num_rows for i in range(unit.first))
        names = parquet.schema_arrow.names
        pick = _records_row if raw.form == "records" else _hf_picker(raw, names, file)
        for group in range(unit.first, unit.last):
            for row in _group_rows(parquet, group, file):
                before += 1
                yield pick(row, f"{_stem(raw, file)}-{before}", f"{file}, row {before}", raw)


def _group_rows(parquet: pq.ParquetFile, group: int, file: Path) -> list[dict[str, Any]]:
    """Rows of a row group. Text that is not UTF-8 gets lone surrogates, which mark it as invalid."""
    try:
        return decoded_rows(parquet.read_row_group(group), lambda text: text.decode("utf-8", "surrogateescape"))
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(
            f"{file}: row group {group + 1} of {parquet.num_row_groups} can't be read ({why}); fetch the file again"
        ) from error


def _stem(raw: RawData, file: Path) -> str:
    """The file's name in ids: its path within SOURCE, so that files of the same name get different ids."""
    return (file.relative_to(raw.path) if raw.path.is_dir() else Path(file.name)).with_suffix("").as_posix()


def _records_row(row: dict[str, Any], name: str, place: str, raw: RawData) -> RawSample:
    folder = Path(place.rpartition(", row ")[0]).parent
    given = row.get("references")
    values = given if isinstance(given, list) else [] if given is None else [given]
    references = tuple(_image_bytes(_unpacked(value), folder, raw) for value in values)
    image = _image_bytes(_unpacked(row.get("image")), folder, raw)
    own = str(row.get("source") or raw.name)
    id = name if row.get("id") in (None, "") else str(row["id"])
    return RawSample(id, str(row.get("task")), row.get("prompt"), row.get("answer"), image, references, place, own)


def _hf_picker(raw: RawData, names: list[str], file: Path) -> Any:
    """A function that makes a sample from a row, using the columns found in `names`."""
    image = _column(raw, "image", HF_IMAGE, names, file)
    prompt = _column(raw, "prompt", HF_TEXT, names, file)
    reference_column = raw.columns.get("references")
    if reference_column and reference_column not in names:
        raise UserError(f"{file}: no column {reference_column!r}; it has: {', '.join(names)}")

    def pick(row: dict[str, Any], name: str, place: str, raw: RawData) -> RawSample:
        values = row[reference_column] if reference_column else []
        references = tuple(
            _image_bytes(_unpacked(v), file.parent, raw) for v in (values if isinstance(values, list) else [values])
        )
        text, target = row[prompt], _image_bytes(_unpacked(row[image]), file.parent, raw)
        return RawSample(name, raw.task, text, text, target, references, place, raw.name)

    return pick


def _column(raw: RawData, role: str, usual: tuple[str, ...], names: list[str], file: Path) -> str:
    given = raw.columns.get(role)
    found = given if given in names else next((n for n in usual if n in names), None) if given is None else None
    if found is None:
        raise UserError(f"{file}: which column is the {role}? It has: {', '.join(names)}; say --column {role}=NAME")
    return found


def _unpacked(value: Any) -> Any:
    """The bytes or path in an image struct {bytes, path}; any other value unchanged."""
    return value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value


def _image_bytes(value: Any, folder: Path, raw: RawData) -> bytes | UriError | None:
    """Image bytes, given as they are or by path or URI, or the error from reading them; None if there is no name.

    None also for a missing file, except in `records`.
    """
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return UriError("image", f"{type(value).__name__}; allowed: bytes, a name or a struct of bytes and path")
    try:
        return read_uri(absolute(value, folder, raw.reach())) if value else None
    except UriError as error:
        return None if error.missing and raw.form != "records" else error


def _read_entry(raw: RawData, file: Path, row: int, entry: Any) -> RawSample:
    """One row of the JSON forms (M2.6)."""
    place, name = f"{file}, row {row}", f"{_stem(raw, file)}-{row}"
    root = raw.images or (raw.path if raw.path.is_dir() else raw.path.parent)
    entry = entry if isinstance(entry, Mapping) else {}
    if raw.form == "edits":
        given = entry.get("input_image") or []
        references = tuple(_image_bytes(v, root, raw) for v in (given if isinstance(given, list) else [given]))
        text, image = entry.get("instruction"), entry.get("output_image")
        return RawSample(name, "edit", text, text, _image_bytes(image, root, raw), references, place, raw.name)
    if raw.form == "blip3o":
        text, image = entry.get("txt"), entry.get("image") or entry.get("image_path")
    else:
        text, image = _annotation(root, entry.get("annotation"), raw), entry.get("image")
    return RawSample(name, raw.task, text, text, _image_bytes(image, root, raw), (), place, raw.name)


def _annotation(root: Path, name: Any, raw: RawData) -> Any:
    """The caption in an annotation file; None if the file or the caption is missing."""
    data = _image_bytes(name, root, raw)
    content = _json_or_none(data) if isinstance(data, bytes) else None
    return content.get(raw.caption_key) if isinstance(content, Mapping) else None


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------- tars


def _read_tar(raw: RawData, file: Path) -> Iterator[RawSample]:
    """Samples of one tar. Raises UserError if the archive is truncated or damaged."""
    key, parts = "", list[tuple[str, bytes]]()
    for name, content in _members(file):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:  # hidden files, such as ._0.png from macOS, belong to no sample
            continue
        if f"{folder}/{stem}" != key and parts:
            yield _tar_sample(raw, file, key, parts)
            parts = []
        key = f"{folder}/{stem}"
        parts.append((extension.lower(), content))
    if parts:
        yield _tar_sample(raw, file, key, parts)


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a tar's files. Raises UserError if the archive is truncated or damaged."""
    count = 0
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                count += 1
                if member.isfile():
                    content = tar.extractfile(member)
                    yield member.name, content.read() if content else b""
            _require_end(tar)
    except OSError as error:
        if error.errno is not None:  # from the file system; errors from decompressors have no number
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        raise _damaged(file, count, str(error)) from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        raise _damaged(file, count, str(error)) from error


def _damaged(file: Path, count: int, why: str) -> UserError:
    repair = "fetch it again, or unpack what is left and pack that anew"
    return UserError(f"{file}: damaged archive ({why} after {count} members); {repair}")


def _require_end(tar: tarfile.TarFile) -> None:
    """Raise TarError unless only zeros follow the last member, at least one block of them.

    tarfile treats a damaged or missing header as the end of the archive. Reading to the end of the file also makes
    decompressors verify their checksums.
    """
    assert tar.fileobj is not None  # `tar` is open
    tar.fileobj.seek(tar.offset)
    found = 0
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        found += len(chunk)
    if found < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"ends without its closing block at byte {tar.offset}")


def _tar_sample(raw: RawData, file: Path, key: str, files: Sequence[tuple[str, bytes]]) -> RawSample:
    parts = dict(files)
    images = {name: data for name, data in parts.items() if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES}
    references = tuple(images[name] for name in sorted(images, key=_natural) if name.startswith(_SOURCES))
    targets = _targets([name for name in images if not name.startswith(_SOURCES)])
    text: Any = None
    if "txt" in parts:  # text that is not UTF-8 stays invalid, so `check_sample` rejects it
        text = parts["txt"].removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").strip()
    elif "json" in parts:
        content = _json_or_none(parts["json"])
        if isinstance(content, Mapping):
            text = next((content[k] for k in (raw.caption_key, *HF_TEXT) if k in content), None)
    repeated = [name for name, count in Counter(name for name, _ in files).items() if count > 1]
    fault = f"a name twice: {_some(repeated)}" if repeated else ""
    if not fault and len(targets) > 1:
        fault = f"more than one target image: {_some(targets)}"
    place, key = f"{file}, sample {key.lstrip('/')}", key.lstrip("/")
    name = f"{file.relative_to(raw.path).as_posix() if raw.path.is_dir() else file.name}/{key}"
    task = "edit" if references else raw.task
    image = images[targets[0]] if targets else None
    return RawSample(name, task, text, text, image, references, place, raw.name, fault)


def _targets(names: list[str]) -> list[str]:
    """Candidates for the target: images named as targets; else images with a bare extension; else all images."""
    said = [name for name in names if name.startswith(_TARGETS)]
    return said or [name for name in names if "." not in name] or names


def _natural(name: str) -> list[Any]:
    """Sort key that puts source.2.png before source.10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
