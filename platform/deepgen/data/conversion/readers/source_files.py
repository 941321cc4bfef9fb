"""Finds the files of a source: at any depth, through links, without hidden ones."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from deepgen.data.conversion.readers.raw_sample import IMAGE_SUFFIXES
from deepgen.data.parquet import require_regular
from deepgen.errors import UserError
from deepgen.reading.tables import TABLES, suffix_of

TARS = (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
# Files that the library datasets puts beside its data.
_HELPERS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
TAR, PARQUET, ARROW, TEXT, PICTURE = "tar", "parquet", "arrow", "text", "picture"


@dataclass
class Found:
    """Files of the kinds that were looked for, sorted, and what was passed over."""

    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # their names, or a folder's, begin with a dot
    repeated: list[Path] = field(default_factory=list)  # links to what has been found elsewhere
    others: list[Path] = field(default_factory=list)  # of no kind, or of another one
    outward: list[Path] = field(default_factory=list)  # links that were followed out of the folder

    def notes(self) -> list[str]:
        """Lines that say what was passed over, and why, and what lies elsewhere."""
        why = {
            "hidden files": self.hidden,
            "links to what is read already": self.repeated,
        }
        lines = [f"passed over {len(paths):,} {what}, the first {paths[0]}" for what, paths in why.items() if paths]
        if self.outward:
            lines.append(f"follows {len(self.outward):,} links out of the folder, the first {self.outward[0]}")
        return lines


def kind_of(path: Path) -> str:
    """What a file is by its name: one of TAR, PARQUET, ARROW, TEXT, PICTURE, a suffix in TABLES, or "" if unknown."""
    name = path.name.lower()
    if name in _HELPERS:
        return ""
    if name.endswith(TARS):
        return TAR
    suffix = suffix_of(path)
    kinds = {".parquet": PARQUET, ".arrow": ARROW, ".txt": TEXT} | dict.fromkeys(IMAGE_SUFFIXES, PICTURE)
    return suffix if suffix in TABLES else kinds.get(suffix, "")


def find_files(path: Path, kinds: Collection[str] = ()) -> Found:
    """A folder's files of some kinds, or of every known kind. If `path` is a file: that file, whatever its name.

    Raises UserError for what cannot be read: an absent path, a folder without permission, a dead link, a pipe.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        _check_regular(path)
        return Found([path])
    found = Found()
    top, targets = Path(os.path.realpath(path)), set[str]()
    for file in _walk(path, found):
        kind = kind_of(file)
        if not kind or (kinds and kind not in kinds):
            found.others.append(file)
            continue
        if kind != PICTURE:  # one picture may have two names and captions; an archive is the same samples twice
            _check_regular(file)
            target = os.path.realpath(file)
            if target in targets:
                found.repeated.append(file)
                continue
            targets.add(target)
            if file.is_symlink() and not Path(target).is_relative_to(top):
                found.outward.append(file)
        found.files.append(file)
    found.files.sort()
    return found


def _walk(top: Path, found: Found) -> list[Path]:
    """All files below a folder that are not hidden, real ones before links. Enters every folder once, links last.

    A link to a folder around it, such as `/`, is not entered: it would lead to all the rest of the disk.
    """
    whole, entered = Path(os.path.realpath(top)), set[str]()
    folders, links, files = [top], list[Path](), list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in entered or (folder != top and whole.is_relative_to(real)):
            found.repeated.append(folder)
            continue
        entered.add(real)
        if folder.is_symlink() and not Path(real).is_relative_to(whole):
            found.outward.append(folder)
        try:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                here = folder / entry.name
                if entry.name.startswith("."):
                    found.hidden += _data_in(here)
                elif not entry.is_dir():
                    files.append(here)
                else:
                    (links if entry.is_symlink() else folders).append(here)
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(files, key=lambda file: (file.is_symlink(), file))


def _data_in(hidden: Path) -> list[Path]:
    """The files at or below a hidden path that could have been meant as data."""
    folders = () if hidden.is_symlink() else os.walk(hidden)
    within = sorted(Path(folder) / name for folder, _, names in folders for name in names)
    return [file for file in (within or [hidden]) if kind_of(file)]


def _check_regular(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file}: a link to nothing; remove it, or mend it")
    require_regular([file])
