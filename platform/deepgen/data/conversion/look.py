"""Says what a conversion would keep and drop, from a sample of the source, within seconds. Writes nothing."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from deepgen.data.conversion.convert_units import Limits, check_sample, has_more_captions
from deepgen.data.conversion.raw_data import notes_of, read_unit, source_files
from deepgen.data.conversion.readers.columnar import parts_of
from deepgen.data.conversion.readers.raw_sample import RawData, RawSample, Unit
from deepgen.data.conversion.readers.source_files import ARROW, PARQUET, kind_of
from deepgen.data.images import header_size
from deepgen.data.records import Record
from deepgen.data.uris import UriError
from deepgen.errors import UserError
from deepgen.masking import masked

SAMPLES = 100
SECONDS = 5.0  # for all samples; no sample is begun later
_FILES = 5  # that the samples come from, spread over all
_SHOWN = 3
_LONGEST = 300  # letters of a place in a line
_T = TypeVar("_T")


def look(raw: RawData, limits: Limits, max_bad_share: float) -> Iterator[str]:
    """Lines for the console. Raises UserError if no sample can be used, or a file cannot be read."""
    found = source_files(raw)
    files = found.files
    yield f"{raw.path}: form {raw.form}, {len(files):,} file{'s' * (len(files) != 1)}"
    yield from notes_of(raw, found)
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    several = 0
    for sample in _samples(raw, files):
        record, reason = check_sample(sample, limits)
        if record is not None:
            several += has_more_captions(sample)
            kept.append(record if len(kept) < _SHOWN else Record(record.id, record.task, "", "", None, (), ""))
            continue
        reason = reason.partition(":")[0] if sample.fault else reason
        dropped[reason] += 1
        first.setdefault(reason, _place(sample))
    total = len(kept) + dropped.total()
    tasks = ", ".join(f"{count:,} {task}" for task, count in Counter(record.task for record in kept).most_common())
    yield f"of {total:,} samples looked at, {len(kept):,} would be kept{f' ({tasks})' if tasks else ''}"
    for reason, count in dropped.most_common():
        yield f"  {count:,} dropped: {reason}; the first: {first[reason]}"
    yield from (f"  kept: {_shown(record)}" for record in kept[:_SHOWN])
    if several:
        yield f"{several:,} have several captions; the first of each is kept"
    if not kept:
        raise UserError(f"{raw.path}: not one of {total:,} samples looked at can be used")
    if dropped.total() > max_bad_share * total:
        yield f"a conversion stops if so many are dropped everywhere; allowed: {max_bad_share:.1%} (--max-bad-share)"
    yield "nothing was written"


def _samples(raw: RawData, files: list[Path]) -> Iterator[RawSample]:
    """Up to SAMPLES samples of some files, as far as the time allows."""
    end = time.monotonic() + SECONDS
    units = list(_units(raw, files))
    each = -(-SAMPLES // max(1, len(units)))
    for number, unit in enumerate(units, start=1):
        until = end - SECONDS * (len(units) - number) / len(units)
        for sample in itertools.islice(read_unit(raw, unit, until), each):
            yield sample
            if time.monotonic() > until:
                break


def _units(raw: RawData, files: list[Path]) -> Iterator[Unit]:
    """Parts of the source to look at. No table is read to its end for them."""
    if raw.form == "folder":
        folder = raw.path if raw.path.is_dir() else raw.path.parent
        names = [file.relative_to(folder).as_posix() for file in files]
        yield Unit(0, str(folder), 0, SAMPLES, entries=tuple(_spread(names, SAMPLES)))
        return
    for number, file in enumerate(_spread(files, _FILES)):
        if raw.form == "hf" or kind_of(file) in (PARQUET, ARROW):
            yield from (Unit(number, str(file), *part) for part in parts_of(file, 1)[:1])
        else:
            yield Unit(number, str(file), 0, 1 << 62)


def _spread(items: list[_T], most: int) -> list[_T]:
    """Some items of a list, evenly spread, among them the first."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def _place(sample: RawSample) -> str:
    """Where a dropped sample is, with what could not be read."""
    unread = next(
        (data for data in (sample.prompt, sample.image, *sample.references) if isinstance(data, UriError)), None
    )
    details = sample.fault.partition(": ")[2] if sample.fault else unread.name if unread else ""
    return _one_line(sample.place) + (f" ({_one_line(details)})" if details else "")


def _one_line(text: str) -> str:
    """A name without secrets, cut and on one line: a file's name may hold line breaks."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in masked(text[:1000]))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _shown(record: Record) -> str:
    size = header_size(record.image) if isinstance(record.image, bytes) else (None, None)
    pixels = f", {size[0]} x {size[1]} px" if size[0] else ""
    sources = f", {len(record.references)} source images" if record.references else ""
    prompt = masked(record.prompt[:1000])[:100] + ("..." if len(record.prompt) > 100 else "")
    return f"{_one_line(record.id)} ({record.task}{pixels}{sources}): {prompt!r}"
