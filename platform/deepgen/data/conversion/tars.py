"""Reads samples of WebDataset tars."""

from __future__ import annotations

import codecs
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgen.data.conversion.raw_sample import IMAGE_SUFFIXES, RawData, RawSample
from deepgen.data.conversion.row_forms import HF_TEXT, json_or_none
from deepgen.errors import UserError

_SOURCES, _TARGETS = ("source", "input", "src"), ("target", "output")  # prefixes of file names in tars of edits


def read_tar(raw: RawData, file: Path) -> Iterator[RawSample]:
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
        content = json_or_none(parts["json"])
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
