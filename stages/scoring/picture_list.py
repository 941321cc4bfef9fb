"""The pictures of a folder, each with its prompt.

Which prompt a picture has, in this order: the row of the list that names its file as `image`, the id or the prompt that
a picture of `stages/generate.py` says inside, the id with which its file's name begins. A picture without one is left
out and told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from deepgen.config.settings import TASKS
from deepgen.data.conversion.readers.raw_sample import CAPTION_SUFFIXES
from deepgen.data.images import DECODE_ERRORS, decode_image, read_header
from deepgen.data.parquet import read_rows
from deepgen.data.quotes import quoted_words
from deepgen.data.records import Record, RecordError, is_unicode
from deepgen.data.uris import MAX_BYTES
from deepgen.drawing.picture_files import MANIFEST, SHEET, TABLE, PictureFolder
from deepgen.drawing.prompts import names_a_file
from deepgen.errors import UserError
from deepgen.reading.file_reader import read_file
from rewards import RewardRequest

# fmt: off
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".qoi", ".tga",
)
# fmt: on
OURS = (MANIFEST, SHEET, TABLE)  # of `stages/generate.py`, beside its pictures
TOLD = 10  # files that are no pictures, a line each
_SAMPLE = re.compile(r"[-_]\d+$")


@dataclass(frozen=True)
class Picture:
    """A file and its prompt. pixels: by its header, 0 if it has no readable one."""

    file: Path
    record: Record
    pixels: int = 0

    @property
    def name(self) -> str:
        """The file's name, as UTF-8 has it: other bytes are spelled out (caf\\xe9.png)."""
        return os.fsencode(self.file.name).decode("utf-8", "backslashreplace")

    @property
    def group(self) -> tuple[str, str]:
        """What pictures of one prompt have in common."""
        return self.record.id, self.record.prompt

    def request(self) -> RewardRequest:
        """What the rewards are asked. Raises ValueError if the picture or one of its sources cannot be read."""
        one = self.record
        try:
            data = read_picture(self.file)
        except OSError as error:
            raise ValueError(f"picture: {error.strerror or error}") from error
        image, *sources = (_decoded(data, "picture"), *(_decoded(source, "source") for source in one.references))
        return RewardRequest(one.prompt, one.answer, one.task, image, tuple(sources))


def _decoded(image: bytes | str, what: str) -> np.ndarray:
    try:
        return decode_image(image)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def read_picture(file: Path) -> bytes:
    """The bytes of a picture, which may be behind a link. Raises OSError."""
    return read_file(os.path.realpath(file), MAX_BYTES)


def one_line(name: object) -> str:
    """A file's name for a line of text: what would break or hide the line is spelled out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(name)
    )


@dataclass
class Found:
    """Pictures in the order of their files' names, and what is left out, a line each."""

    pictures: list[Picture] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def find_pictures(folder: Path, prompts: str | None, allow: Sequence[str] = ()) -> Found:
    """The pictures in a folder and their prompts.

    prompts: a list of them, as for `stages/generate.py`; one prompt for all; or None for what the pictures say inside.

    Raises UserError if the folder has no picture, if the list cannot be read, or if no picture has a prompt.
    """
    if prompts is not None and not is_unicode(prompts):
        raise UserError("--prompts: got bytes that are no UTF-8; allowed: text, or a file with it")
    found = Found()
    files = _files(folder, prompts, found.left_out)
    listed = prompts is not None and names_a_file(prompts)
    rows = list(_rows(Path(prompts), allow, found.left_out)) if listed and prompts is not None else []
    if prompts is not None and not listed and not prompts.strip():
        raise UserError("--prompts: the prompt is empty")
    known = _Known.of(rows)
    for file in files:
        try:
            told, pixels = _told(file)
        except OSError as error:
            found.left_out.append(f"{one_line(file)}: {error.strerror or error}")
            continue
        record = known.find(file, told) if listed else _record(prompts or told.get("prompt", ""), told, prompts)
        if file.name in known.twice:
            found.left_out.append(f"{one_line(file)}: two rows of {prompts} with different contents name it as image")
        elif record is None:
            found.left_out.append(f"{one_line(file)}: has no prompt, {_why(prompts, listed)}")
        else:
            found.pictures.append(Picture(file, record, pixels))
    used = {picture.record.id for picture in found.pictures}
    if lone := [record.id for record in rows if record.id not in used]:
        found.left_out.append(
            f"{prompts}: {len(lone):,} of {len(rows):,} usable rows have no picture, first {lone[0]!r}"
        )
    if not found.pictures:
        first = next((line for line in found.left_out if "has no prompt" in line), "".join(found.left_out[:1]))
        why = f"; the first: {first}" if first else ""
        raise UserError(f"--images: no picture in {folder} has a prompt{why}")
    return found


@dataclass(frozen=True)
class _Known:
    """Records by all that a picture may name them with. twice: names of files that stand for two records."""

    files: Mapping[str, Record]
    twice: Set[str]
    ids: Mapping[str, Record]
    prompts: Mapping[str, Record]
    names: Mapping[str, Record]

    @classmethod
    def of(cls, records: Sequence[Record]) -> _Known:
        folder, files, twice = PictureFolder(Path()), dict[str, Record](), set[str]()
        for one in records:
            if isinstance(one.image, str):
                first = files.setdefault(Path(one.image).name, one)
                if replace(first, id=one.id, image=one.image) != one:
                    twice.add(Path(one.image).name)
        return cls(
            files,
            twice,
            {one.id: one for one in records},
            {one.prompt: one for one in reversed(records)},
            {_SAMPLE.sub("", folder.path(one, 0).stem): one for one in records},
        )

    def find(self, file: Path, told: Mapping[str, str]) -> Record | None:
        stem = file.stem
        return (
            self.files.get(file.name)
            or self._drawn(told)
            or self.names.get(stem)
            or self.ids.get(stem)
            or self.names.get(_SAMPLE.sub("", stem))
        )

    def _drawn(self, told: Mapping[str, str]) -> Record | None:
        """The record that a picture was drawn for: an id may stand for another prompt in another list."""
        by_id = self.ids.get(told.get("id", ""))
        if by_id is not None and by_id.prompt == told.get("prompt"):
            return by_id
        return self.prompts.get(told.get("prompt", ""))


def _no_picture(file: Path) -> str:
    """Why a file is none by its bytes, or cannot be read; "" if it is one, or is called like one, and told later."""
    if file.suffix.lower() in SUFFIXES:
        return ""
    try:
        data = read_picture(file)
    except OSError as error:
        return error.strerror or str(error)
    try:
        read_header(data)
    except DECODE_ERRORS as error:
        return f"no picture ({error})"
    return ""


def _same(file: Path, other: str) -> bool:
    return file.name == Path(other).name and os.path.realpath(file) == os.path.realpath(other)


def _files(folder: Path, prompts: str | None, left_out: list[str]) -> list[Path]:
    """All that is a picture or called like one, also what cannot be read. What else lies there is told, but captions.

    prompts: the list, which may lie among them.
    """
    if not folder.is_dir():
        raise UserError(f"--images: {folder} is no folder")
    ours = (folder / MANIFEST).is_file()
    found = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if inner := [file for file in found if file.is_dir()]:
        left_out.append(
            f"{one_line(inner[0])}: a folder ({len(inner):,} of them; only what lies beside them is scored)"
        )
    candidates = [
        file
        for file in found
        if not file.is_dir() and not (ours and file.name in OURS) and not (prompts and _same(file, prompts))
    ]
    strange = {file: why for file in candidates if (why := _no_picture(file))}
    told = [f"{one_line(file)}: {why}" for file, why in strange.items() if file.suffix.lower() not in CAPTION_SUFFIXES]
    left_out += told[:TOLD]
    if len(told) > TOLD:
        left_out.append(f"{len(told) - TOLD:,} more files in {folder} that are no pictures")
    files = [file for file in candidates if file not in strange]
    if not files:
        raise UserError(f"--images: {folder} has no picture in it; allowed: {', '.join(SUFFIXES)}")
    return files


def _rows(path: Path, allow: Sequence[str], left_out: list[str]) -> Iterator[Record]:
    for row in read_rows(path, allow, each_line=True):
        if isinstance(row.record, RecordError):
            left_out.append(f"{row.file}, row {row.number}: {row.record.reason}")
        else:
            yield row.record


def _told(file: Path) -> tuple[dict[str, str], int]:
    """What a picture of `stages/generate.py` says of itself, {} for any other; and its pixels. Raises OSError."""
    data = read_picture(file)
    try:
        with read_header(data) as image:
            told, pixels = {str(key): str(value) for key, value in image.info.items()}, image.width * image.height
    except DECODE_ERRORS:
        return {}, 0  # reported when it is decoded
    return told if "noise_seed" in told else {}, pixels


def _record(prompt: str, told: Mapping[str, str], given: str | None) -> Record | None:
    if not prompt:
        return None
    task = "" if given is not None else told.get("task", "")
    if task not in TASKS:
        task = "text" if quoted_words(prompt) else "t2i"
    return Record("" if given is not None else told.get("id", ""), task, prompt, prompt, None, (), "--images")


def _why(prompts: str | None, listed: bool) -> str:
    if listed:
        return f"as no row of {prompts} has its file as image, its id or its prompt"
    return "as it was not drawn by stages/generate.py; allowed: --prompts with a list, or with one prompt for all"
