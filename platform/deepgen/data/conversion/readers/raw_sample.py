"""What readers of raw data get and give: the data and how to read it, a part of it, and one sample as found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepgen.data.uris import UriError, reach_of
from deepgen.reading.reach import Reach

FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".svg")  # images that we do not read: dropped with that reason
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".png", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
    *FOREIGN_SUFFIXES,
)
CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # of the caption that belongs to a picture, the first one counts


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

    def reach(self, file: Path) -> Reach:
        """What may be read by the names in a file of the data, and by its own name.

        If the file was found behind a link to a folder, the folder that the link leads to belongs to the data. It does
        so for the files in it only: any other file could name whatever lies behind some link.
        """
        behind = [one for one in file.parents if self.path in one.parents and one.is_symlink()][:1]
        return reach_of(self.path, self.allow, *([self.images] if self.images else []), *behind)


@dataclass(frozen=True)
class Unit:
    """Rows first..last-1 of one file, or of its row groups if it is parquet, or of its batches if it is Arrow.

    offset: the byte where they begin, in a table. entries: the pictures, in a folder of them.
    """

    number: int
    file: str
    first: int
    last: int
    offset: int = 0
    entries: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawSample:
    """One sample as it was found, and its place.

    An image is encoded bytes, None if absent, or the error from reading it. `id` is unique in the data set, except in
    `records`, which bring their own ids. `fault`: why the files do not form a sample, as "kind: details".
    `is_prompt`: a sample without an image is whole.
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
    is_prompt: bool = False


def stem_of(raw: RawData, file: Path) -> str:
    """The file's name in ids: its path within SOURCE, so that files of the same name get different ids."""
    return (file.relative_to(raw.path) if raw.path.is_dir() else Path(file.name)).with_suffix("").as_posix()
