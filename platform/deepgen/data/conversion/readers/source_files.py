"""Finds the files of a source: at any depth, through links, without hidden ones."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from deepgen.data.conversion.readers.raw_sample import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from deepgen.data.parquet import require_regular
from deepgen.errors import UserError
from deepgen.reading.tables import TABLES, suffix_of

TARS = (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
# Files that the library datasets puts beside its data.
_HELPERS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
TAR, PARQUET, ARROW, TEXT, PICTURE = "tar", "parquet", "arrow", "text", "picture"
_KINDS = {".parquet": PARQUET, ".arrow": ARROW, ".txt": TEXT} | dict.fromkeys(IMAGE_SUFFIXES, PICTURE)
_SHOWN_KINDS = 5


@dataclass
class Found:
    """Files of the kinds that were looked for, sorted, and what was passed over."""

    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # their names, or a folder's, begin with a dot
    repeated: list[Path] = field(default_factory=list)  # links to what has been found elsewhere
    others: list[Path] = field(default_factory=list)  # of no kind, or of one that the form does not read
    outward: list[Path] = field(default_factory=list)  # links that were followed out of the folder

    def notes(self) -> list[str]:
        """Lines that say what was passed over, and why, and what lies elsewhere."""
        why = {
            "hidden files": self.hidden,
            "links to what is read already": self.repeated,
        }
        lines = [f"passed over {len(paths):,} {what}, the first {paths[0]}" for what, paths in why.items() if paths]
        if self.others:
            counts = Counter(file.suffix.lower() or "no suffix" for file in self.others).most_common()
            some = ", ".join(f"{count:,} {suffix}" for suffix, count in counts[:_SHOWN_KINDS])
            more = ", ..." if len(counts) > _SHOWN_KINDS else ""
            lines.append(
                f"passed over {len(self.others):,} files of other kinds ({some}{more}), the first {self.others[0]}"
            )
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
    return suffix if suffix in TABLES else _KINDS.get(suffix, "")


def find_files(path: Path, kinds: Collection[str] = ()) -> Found:
    """A folder's files of some kinds, or of every known kind. If `path` is a file: that file, whatever its name.

    Raises UserError for what cannot be read: an absent path, a folder without permission, a dead link, a pipe.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        _check_regular(path)
        return Found([path])
    found, others = Found(), list[Path]()
    top, targets = Path(os.path.realpath(path)), set[str]()
    walked = _walk(path, found)
    for file, is_link in walked:
        kind = kind_of(file)
        if not kind or (kinds and kind not in kinds) or _is_cache(file, kind):
            others.append(file)
            continue
        if kind != PICTURE:  # one picture may have two names and captions; an archive is the same samples twice
            _check_regular(file)
            target = os.path.realpath(file)
            if target in targets:
                found.repeated.append(file)
                continue
            targets.add(target)
            if is_link and not Path(target).is_relative_to(top):
                found.outward.append(file)
        found.files.append(file)
    found.files.sort(key=lambda file: file.parts)
    captions = captions_of(file for file, _ in walked)
    named = not kinds or not {TAR, PICTURE} & set(kinds)  # rows name the pictures beside their file
    found.others = [
        file
        for file in sorted(others)
        if not (file in captions or _is_about(file) or (named and kind_of(file) == PICTURE))
    ]
    return found


def captions_of(files: Iterable[Path]) -> set[Path]:
    """Those of the files that are captions of a picture among them: 1.txt or 1.jpg.txt beside 1.jpg."""
    names = {file: os.path.splitext(file) for file in files}
    pictures = {base for base, suffix in names.values() if suffix.lower() in IMAGE_SUFFIXES}
    pictures |= {base + suffix for base, suffix in names.values() if suffix.lower() in IMAGE_SUFFIXES}
    return {file for file, (base, suffix) in names.items() if suffix.lower() in CAPTION_SUFFIXES and base in pictures}


def side_files_of(files: Iterable[Path]) -> set[Path]:
    """Those of the files that img2dataset writes beside its tars, parquet files or folders of pictures.

    For 00000.tar, 00000.parquet has the rows without the pictures; 00000_stats.json counts them.
    """
    names = {str(file): file for file in files}
    parts = {name.removesuffix("_stats.json") for name in names if name.endswith("_stats.json")}
    folders = {str(file.parent) for file in names.values() if kind_of(file) == PICTURE} if parts else set[str]()
    found = set[Path]()
    for part in parts:
        held, listed = part in folders or f"{part}.tar" in names, f"{part}.parquet"
        if held or listed in names:
            found.add(names[f"{part}_stats.json"])
        if held and listed in names:
            found.add(names[listed])
    return found


def _is_cache(file: Path, kind: str) -> bool:
    """Whether it is an intermediate result of `datasets` (of map and filter), which holds the same rows again."""
    return kind == ARROW and file.name.startswith("cache-") and (file.parent / "dataset_info.json").exists()


def _is_about(file: Path) -> bool:
    """Whether it is a file about the data that nobody would take for data."""
    name = file.name.lower()
    return name in _HELPERS or name.endswith(".md") or name.startswith("license")


def _walk(top: Path, found: Found) -> list[tuple[Path, bool]]:
    """All files below a folder that are not hidden, and whether they are links, real ones before links.

    Enters every folder once, links last. A link to a folder around it, such as `/`, is not entered: it would lead to
    all the rest of the disk.
    """
    whole, entered = Path(os.path.realpath(top)), set[str]()
    folders, links, files = [top], list[Path](), list[tuple[Path, bool]]()
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
                elif not _is_folder(entry):
                    files.append((here, entry.is_symlink()))
                else:
                    (links if entry.is_symlink() else folders).append(here)
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(files, key=lambda found: (found[1], found[0].parts))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one. A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _data_in(hidden: Path) -> list[Path]:
    """The files at or below a hidden path that could have been meant as data."""
    folders = () if hidden.is_symlink() else os.walk(hidden)
    within = sorted(Path(folder) / name for folder, _, names in folders for name in names)
    return [file for file in (within or [hidden]) if kind_of(file)]


def _check_regular(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise UserError(f"{file}: a link to nothing; remove it, or mend it")
    require_regular([file])
