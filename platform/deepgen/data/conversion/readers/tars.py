"""Reads samples of WebDataset tars, whatever the order of their members.

A first pass over a tar only reads its headers; it notes where the files of every sample are. They are then read sample
by sample, so memory holds one sample. A compressed tar can only be read from front to back: if the files of samples
lie apart in it, their texts are read before their images.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from deepgen.data.conversion.readers.image_values import MAX_SAMPLE, TOO_LARGE
from deepgen.data.conversion.readers.raw_sample import CAPTION_SUFFIXES, IMAGE_SUFFIXES, RawData, RawSample
from deepgen.data.conversion.readers.row_forms import JSON_BYTES, first_caption
from deepgen.data.uris import UriError
from deepgen.errors import UserError

# Prefixes of file names in tars of edits.
_SOURCES, _TARGETS = ("source", "input", "src", "original", "before"), ("target", "output", "edited", "after")
_TEXTS = tuple(suffix[1:] for suffix in CAPTION_SUFFIXES)
MAX_MEMBERS = 1_000_000  # of one tar; each takes about 300 bytes of memory
MAX_NAME = 4096  # bytes of a member's name
_MAX_HEADER = 1 << 20  # bytes of a member's additional headers, which tarfile reads as a whole
_HELD_TEXTS = 128 << 20  # bytes of the texts of a compressed tar whose samples lie apart
_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class _Unpacked(io.RawIOBase):
    """A compressed file, unpacked. To go forward it reads a mebibyte at a time; the libraries' own files take 8 KiB."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return bytes(self._stream.read(size))

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence or offset < self.tell():
            return int(self._stream.seek(offset, whence))
        while (left := offset - self.tell()) and self._stream.read(min(left, 1 << 20)):
            pass
        return self.tell()


class _Member(tarfile.TarInfo):
    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_sparse(self, tar: Any) -> Any:
        """Pass over the map of a file with holes. tarfile would keep all of it, however long, and fail at its end."""
        _, goes_on, size = self._sparse_structs  # type: ignore[attr-defined]
        length = 0
        while goes_on:
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            length += len(block)
            if len(block) < tarfile.BLOCKSIZE or length > _MAX_HEADER:
                raise tarfile.ReadError(f"a map of holes of {length:,} bytes that goes on")
            goes_on = block[504]
        self.sparse, self.offset_data = [], tar.fileobj.tell()  # type: ignore[assignment]
        tar.offset = self.offset_data + -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self.size = size
        return self


# Where the files of a sample are: extension, the byte where the content begins, and its size. -1: a file with holes.
_Parts = list[tuple[str, int, int]]


class _Tar:
    """A tar: where the files of its samples are, and what is in them."""

    def __init__(self, file: Path) -> None:
        self.samples: dict[str, _Parts] = {}
        self.count = 0  # members so far
        self._file, self._grouped, self._packed = file, True, False
        self._texts: dict[int, bytes] = {}

    def find_samples(self, tar: tarfile.TarFile, until: float | None) -> None:
        """Read the headers of all members, or of those that come until then. Raises TarError if they are damaged."""
        assert tar.fileobj is not None  # `tar` is open
        self._stream: Any = tar.fileobj
        self._packed = isinstance(tar.fileobj, _Unpacked)
        last = ""
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member
            self.count += 1
            if self.count > MAX_MEMBERS or len(member.name) > MAX_NAME:
                raise tarfile.ReadError(f"over {MAX_MEMBERS:,} members, or a name of over {MAX_NAME:,} letters")
            key, extension = _key(member.name)
            if not key or not member.isreg():
                continue
            parts = self.samples.setdefault(key, [])
            self._grouped &= key == last or not parts
            parts.append((extension, member.offset_data, -1 if member.issparse() else member.size))
            last = key
            if until and time.monotonic() > until:
                self._keep_whole(last)
                self._split_dotted()
                return
        _require_end(tar, until)
        self._split_dotted()
        if self._packed and not self._grouped:
            self._read_texts_first()

    def _keep_whole(self, last: str) -> None:
        """Keep the samples that are whole, as far as can be said before the end of the tar."""

        def whole(parts: _Parts) -> bool:
            return any(_is_image(name) for name, _, _ in parts) and any(_is_text(name) for name, _, _ in parts)

        self.samples = {
            key: parts for key, parts in self.samples.items() if (key != last if self._grouped else whole(parts))
        }

    def _split_dotted(self) -> None:
        """Give a.1.jpg with a.1.txt and a.2.jpg with a.2.txt samples of their own: their names have dots in them."""
        before, self.samples = self.samples, {}
        for key, parts in before.items():  # the order of the archive stays
            stems = set[str]() if any(name in _TEXTS for name, _, _ in parts) else _stems_of_pairs(parts)
            for name, at, size in parts:
                stem, _, extension = name.rpartition(".")
                own = (f"{key}.{stem}", (extension, at, size)) if stem in stems else (key, (name, at, size))
                self.samples.setdefault(own[0], []).append(own[1])

    def _read_texts_first(self) -> None:
        """Read all texts, and put the samples in the order of their images. Raises UserError if that is not enough."""
        images = sorted((at, key) for key, parts in self.samples.items() for name, at, _ in parts if _is_image(name))
        order = [key for key, _ in itertools.groupby(key for _, key in images)]
        texts = [part[1:] for parts in self.samples.values() for part in parts if part[0] in _TEXTS]
        if len(set(order)) < len(order) or sum(min(size, JSON_BYTES) for _, size in texts) > _HELD_TEXTS:
            raise UserError(
                f"{self._file}: the files of one sample lie apart, and a compressed archive can only be read from "
                "front to back; uncompress it and give the .tar"
            )
        for at, size in sorted(texts):
            self._texts[at] = self._read(at, min(size, JSON_BYTES + 1))
        without = [key for key in self.samples if key not in set(order)]
        self.samples = {key: self.samples[key] for key in (*order, *without)}

    def contents(self, parts: _Parts) -> dict[str, bytes | UriError]:
        """The contents of some files, read from front to back; or why one is not read."""
        found: dict[str, bytes | UriError] = {}
        room = MAX_SAMPLE
        for name, at, size in sorted(parts, key=lambda part: part[1]):
            if size < 0:
                found[name] = UriError(name, "a file with holes; pack it without --sparse")
            elif name in _TEXTS:
                found[name] = self._texts.pop(at) if at in self._texts else self._read(at, min(size, JSON_BYTES + 1))
            elif size > room:
                found[name] = UriError(name, TOO_LARGE)
            else:
                room -= size
                found[name] = self._read(at, size)
        return found

    def _read(self, at: int, size: int) -> bytes:
        self._stream.seek(at)
        data = self._stream.read(size)
        if len(data) < size:
            raise tarfile.ReadError(f"unexpected end of data at byte {at + len(data)}")
        return data


def read_tar(raw: RawData, file: Path, until: float | None = None) -> Iterator[RawSample]:
    """Samples of one tar, of its beginning if the search for them takes longer than `until` (monotonic time).

    Raises UserError if the archive is truncated or damaged.
    """
    found = _Tar(file)
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=_unpacked(stream), mode="r:", tarinfo=_Member) as opened:
            found.find_samples(opened, until)
            for key, parts in found.samples.items():
                yield _tar_sample(raw, file, found, key, parts)
    except OSError as error:
        if error.errno is not None:  # from the file system; errors from decompressors have no number
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        raise _damaged(file, found.count, str(error)) from error
    except RecursionError as error:
        raise _damaged(file, found.count, "hundreds of additional headers of one member") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        raise _damaged(file, found.count, str(error)) from error


def _unpacked(stream: BinaryIO) -> Any:
    start = stream.read(6)
    stream.seek(0)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        raise tarfile.ReadError("compressed with zstd; allowed: .tar, or compressed with gzip, bzip2 or xz")
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if start.startswith(magic):
            return _Unpacked(opened(stream))
    return stream


def _key(name: str) -> tuple[str, str]:
    """The sample that a member belongs to and its extension.

    "" for hidden files, such as ._0.png of macOS, and for what tools add: __MACOSX/..., webdataset's __key__.
    """
    *folders, base = [part for part in name.split("/") if part not in ("", ".")] or [""]
    if any(part.startswith(".") and part != ".." for part in (*folders, base)):
        return "", ""
    if "__MACOSX" in folders or (base.startswith("__") and base.endswith("__")):
        return "", ""
    stem, _, extension = base.partition(".")
    return "/".join((*folders, stem)), extension.lower()


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] in _TEXTS


def _stems_of_pairs(parts: _Parts) -> set[str]:
    """What stands before the last dot in extensions of both an image and a text, as "1" in 1.jpg and 1.txt."""
    images, texts = (
        {name.rpartition(".")[0] for name, _, _ in parts if is_kind(name)} for is_kind in (_is_image, _is_text)
    )
    return {stem for stem in images & texts if stem and not stem.startswith((*_SOURCES, *_TARGETS))}


def _damaged(file: Path, count: int, why: str) -> UserError:
    repair = "fetch it again, or unpack what is left and pack that anew"
    return UserError(f"{file}: damaged archive ({' '.join(why.split())} after {count} members); {repair}")


def _require_end(tar: tarfile.TarFile, until: float | None) -> None:
    """Raise TarError unless only zeros follow the last member, at least one block of them; as far as seen until then.

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
        if until and time.monotonic() > until:
            return
    if found < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"ends without its closing block at byte {tar.offset}")


def _tar_sample(raw: RawData, file: Path, tar: _Tar, key: str, parts: _Parts) -> RawSample:
    images = [name for name, _, _ in parts if _is_image(name)]
    sources = sorted((name for name in images if name.startswith(_SOURCES)), key=_natural)
    targets = _targets([name for name in images if not name.startswith(_SOURCES)])
    repeated = [name for name, count in Counter(name for name, _, _ in parts).items() if count > 1]
    fault = f"a name twice: {_some(repeated)}" if repeated else ""
    if not fault and len(targets) > 1:
        fault = f"more than one target image: {_some(targets)}"
    wanted = {*sources, *targets[:1], *_TEXTS}
    found = tar.contents([] if fault else [part for part in parts if part[0] in wanted])
    texts = [name for name in _TEXTS if name in found]
    if not fault and not texts:
        fault = f"no caption in the sample: its files are {_some([name for name, _, _ in parts])}"
    text = first_caption(((found[name], f".{name}") for name in texts), raw.caption_key)
    references = tuple(found.get(name) for name in sources)
    name = f"{file.relative_to(raw.path).as_posix() if raw.path.is_dir() else file.name}/{key}"
    task = "edit" if references else raw.task
    image = found.get(targets[0]) if targets else None
    return RawSample(name, task, text, text, image, references, f"{file}, sample {key}", raw.name, fault)


def _targets(names: list[str]) -> list[str]:
    """Candidates for the target: images named as targets; else images with a bare extension; else all images."""
    said = [name for name in names if name.startswith(_TARGETS)]
    return said or [name for name in names if "." not in name] or names


def _natural(name: str) -> list[Any]:
    """Sort key that puts source.2.png before source.10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
