"""Reading the forms in which users have their data, as raw samples: nothing is checked or decoded here.

| form        | what it is                                                                                          |
|-------------|-----------------------------------------------------------------------------------------------------|
| records     | our parquet (`deepgen.data.records`)                                                                |
| hf          | parquet of Hugging Face datasets: image structs {bytes, path}, text columns                         |
| webdataset  | tars; files of one sample share the name before the first dot: 07.jpg, 07.txt (or 07.json), and for |
|             | editing 07.source.jpg, 07.target.jpg                                                                |
| captions    | JSON list, or a folder of them: {image, annotation}; the caption stands in the annotation's JSON    |
| blip3o      | JSON list: {type, txt, image or image_path}                                                         |
| edits       | JSON list: {input_image: [...], output_image, instruction}                                          |

The last three are those of M2.6 (captions counts twice: list and folder). A `Unit` is the part of a source that one
process converts at a time; the same source and settings always give the same units.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepgen.config.errors import UserError
from deepgen.data.uris import UriError, absolute, read_uri

FORMS = ("records", "hf", "webdataset", "captions", "blip3o", "edits")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
HF_IMAGE, HF_TEXT = ("image", "jpg", "png", "webp"), ("caption", "text", "prompt", "txt", "instruction")


@dataclass(frozen=True)
class Source:
    """What to read. `columns` names the columns of `hf` (image, prompt, references); the rest fits one form each.

    `name` is the data set's, which becomes the column source; `records` keep their own.
    """

    path: Path
    form: str
    task: str = "t2i"
    images: Path | None = None  # folder that relative image paths start from; None: the source's own
    caption_key: str = "caption"
    columns: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Unit:
    """Rows first..last-1 of one file; `entries` are the rows themselves where the file is a list."""

    number: int
    file: str
    first: int
    last: int
    entries: tuple[Any, ...] = ()


@dataclass(frozen=True)
class RawSample:
    """One sample as found and where: encoded images, None for an absent one, or why one cannot be read."""

    id: str
    task: str
    prompt: Any
    answer: Any
    image: bytes | UriError | None
    references: tuple[bytes | UriError | None, ...]
    place: str
    source: str


# ---------------------------------------------------------------- what form it is


def guess_form(path: Path) -> str:
    """One of FORMS. Raises UserError when the form cannot be told, naming what was seen."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = _files(path)
    suffix = files[0].suffix if files else ""
    if suffix == ".tar":
        return "webdataset"
    if suffix == ".parquet":
        names = set(_schema(files[0]).names)
        return "records" if {"task", "prompt", "references"} <= names else "hf"
    if suffix == ".json":
        first = next(iter(_json_list(files[0])), None)
        if isinstance(first, dict):
            for key, form in (("annotation", "captions"), ("txt", "blip3o"), ("input_image", "edits")):
                if key in first:
                    return form
        raise UserError(f"{files[0]}: a list of unknown form; give --form (one of {', '.join(FORMS)})")
    raise UserError(f"{path}: no .parquet, .tar or .json in it")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for suffix in (".parquet", ".tar", ".json"):
        files = sorted(path.rglob(f"*{suffix}"))
        if files:
            return files
    return []


# ---------------------------------------------------------------- units


def plan_units(source: Source, rows: int) -> list[Unit]:
    """Split the source into units of about `rows` samples (a tar is one unit, a parquet row group is never split)."""
    parts: list[tuple[str, int, int, tuple[Any, ...]]] = []
    for file in _files(source.path):
        if source.form == "webdataset":
            parts.append((str(file), 0, 0, ()))
        elif source.form in ("records", "hf"):
            parts += [(str(file), first, last, ()) for first, last in _row_groups(file, rows)]
        else:
            entries = _json_list(file)
            starts = range(0, len(entries), rows)
            parts += [(str(file), s, min(s + rows, len(entries)), tuple(entries[s : s + rows])) for s in starts]
    if not parts:
        raise UserError(f"{source.path}: nothing to convert in it")
    return [Unit(number, *part) for number, part in enumerate(parts)]


def _row_groups(file: Path, rows: int) -> list[tuple[int, int]]:
    """Runs of row groups [first, last) with about `rows` rows each."""
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


def _json_list(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise UserError(f"{file}: holds a {type(content).__name__}; expected a list")
    return content


# ---------------------------------------------------------------- samples


def read_unit(source: Source, unit: Unit) -> Iterator[RawSample]:
    """The samples of a unit. What is absent comes as None; nothing is skipped."""
    if source.form == "webdataset":
        yield from _read_tar(source, Path(unit.file))
    elif source.form in ("records", "hf"):
        yield from _read_parquet(source, unit)
    else:
        for row, entry in enumerate(unit.entries, start=unit.first + 1):
            yield _read_entry(source, Path(unit.file), row, entry)


def _read_parquet(source: Source, unit: Unit) -> Iterator[RawSample]:
    file = Path(unit.file)
    with _open_parquet(file) as parquet:
        before = sum(parquet.metadata.row_group(i).num_rows for i in range(unit.first))
        names = parquet.schema_arrow.names
        pick = _records_row if source.form == "records" else _hf_picker(source, names, file)
        for group in range(unit.first, unit.last):
            for row in parquet.read_row_group(group).to_pylist():
                before += 1
                yield pick(row, f"{file.stem}-{before}", f"{file}, row {before}", source)


def _records_row(row: dict[str, Any], name: str, place: str, source: Source) -> RawSample:
    folder = Path(place.rpartition(", row ")[0]).parent
    references = tuple(_record_image(value, folder) for value in row.get("references") or ())
    image = _record_image(row.get("image"), folder)
    own = str(row.get("source") or source.name)
    return RawSample(
        row.get("id") or name, str(row.get("task")), row.get("prompt"), row.get("answer"), image, references, place, own
    )


def _record_image(value: bytes | str | None, folder: Path) -> bytes | UriError | None:
    """Bytes as they are, or what lies at a path or URI, or why that cannot be read."""
    if not isinstance(value, str):
        return value
    try:
        return read_uri(absolute(value, folder))
    except UriError as error:
        return error


def _hf_picker(source: Source, names: list[str], file: Path) -> Any:
    """A function of a row that knows which columns are which."""
    image = _column(source, "image", HF_IMAGE, names, file)
    prompt = _column(source, "prompt", HF_TEXT, names, file)
    references = source.columns.get("references")
    if references and references not in names:
        raise UserError(f"{file}: no column {references!r}; it has: {', '.join(names)}")

    def pick(row: dict[str, Any], name: str, place: str, source: Source) -> RawSample:
        values = row[references] if references else []
        sources = tuple(_hf_image(v, file) for v in (values if isinstance(values, list) else [values]))
        text, target = row[prompt], _hf_image(row[image], file)
        return RawSample(name, source.task, text, text, target, sources, place, source.name)

    return pick


def _column(source: Source, role: str, usual: tuple[str, ...], names: list[str], file: Path) -> str:
    given = source.columns.get(role)
    found = given if given in names else next((n for n in usual if n in names), None) if given is None else None
    if found is None:
        raise UserError(f"{file}: which column is the {role}? It has: {', '.join(names)}; say --column {role}=NAME")
    return found


def _hf_image(value: Any, file: Path) -> bytes | None:
    """An image struct {bytes, path}, bare bytes, or a path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else _file_bytes(file.parent, value)


def _read_entry(source: Source, file: Path, row: int, entry: Any) -> RawSample:
    """One row of the JSON forms (M2.6)."""
    place, name = f"{file}, row {row}", f"{file.stem}-{row}"
    root = source.images or (source.path if source.path.is_dir() else source.path.parent)
    entry = entry if isinstance(entry, Mapping) else {}
    if source.form == "edits":
        given = entry.get("input_image") or []
        sources = tuple(_file_bytes(root, v) for v in (given if isinstance(given, list) else [given]))
        text, image = entry.get("instruction"), entry.get("output_image")
        return RawSample(name, "edit", text, text, _file_bytes(root, image), sources, place, source.name)
    if source.form == "blip3o":
        text, image = entry.get("txt"), entry.get("image") or entry.get("image_path")
    else:
        text, image = _annotation(root, entry.get("annotation"), source.caption_key), entry.get("image")
    return RawSample(name, source.task, text, text, _file_bytes(root, image), (), place, source.name)


def _annotation(root: Path, name: Any, key: str) -> Any:
    data = _file_bytes(root, name)
    try:
        return json.loads(data)[key] if data else None
    except (ValueError, KeyError, TypeError):
        return None


def _file_bytes(root: Path, name: Any) -> bytes | None:
    """A named file's content, or None: what is absent is counted, it does not end the conversion."""
    if not isinstance(name, str) or not name:
        return None
    path = root / name
    return path.read_bytes() if path.is_file() else None


def _read_tar(source: Source, file: Path) -> Iterator[RawSample]:
    """Samples of one tar. Raises UserError when the archive is cut or damaged."""
    try:
        with tarfile.open(file) as tar:
            key, parts = "", dict[str, bytes]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if f"{folder}/{stem}" != key and parts:
                    yield _tar_sample(source, file, key, parts)
                    parts = {}
                key = f"{folder}/{stem}"
                content = tar.extractfile(member)
                parts[extension.lower()] = content.read() if content else b""
            if parts:
                yield _tar_sample(source, file, key, parts)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{file}: damaged archive ({error})") from error


def _tar_sample(source: Source, file: Path, key: str, parts: Mapping[str, bytes]) -> RawSample:
    images = {name: data for name, data in parts.items() if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES}
    sources = tuple(data for name, data in sorted(images.items()) if name.startswith(("source", "input", "src")))
    targets = [data for name, data in images.items() if not name.startswith(("source", "input", "src"))]
    text: Any = parts["txt"].decode("utf-8", "replace").strip() if "txt" in parts else None
    if text is None and "json" in parts:
        try:
            content = json.loads(parts["json"])
        except ValueError:
            content = None
        if isinstance(content, Mapping):
            text = next((content[k] for k in (source.caption_key, *HF_TEXT) if k in content), None)
    place = f"{file}, sample {key.lstrip('/')}"
    name = f"{file.stem}-{key.strip('/').replace('/', '-')}"
    task = "edit" if sources else source.task
    return RawSample(name, task, text, text, targets[0] if targets else None, sources, place, source.name)
