"""Converts raw samples to parquet shards of our schema. Checks each sample and quarantines unusable ones.

A unit of the raw data becomes one shard, with a quarantine file (JSON lines: place, id, reason) and a tally. The tally
is written last. A unit that has one is done and never read again, so a stopped conversion can continue.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import textwrap
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from deepgen.config.settings import TASKS
from deepgen.data.conversion.raw_data import read_unit
from deepgen.data.conversion.readers.image_values import MAX_SAMPLE, MISSING, TOO_LARGE
from deepgen.data.conversion.readers.raw_sample import RawData, RawSample, Unit
from deepgen.data.images import MAX_ASPECT, MAX_PIXELS, UnknownWhiteError, check_pixels, header_size, open_image
from deepgen.data.parquet import SCHEMA, RecordWriter, to_rows
from deepgen.data.records import Record, as_list, check_row, is_unicode
from deepgen.data.uris import UriError
from deepgen.errors import UserError
from deepgen.masking import masked
from deepgen.reading.file_reader import is_lfs_pointer
from deepgen.reading.reach import Reach

ROW_GROUP = 64  # rows that training reads together
MAX_TEXT = 100_000  # letters of one prompt
_LONGEST = 1000  # letters of a text in the quarantine
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")  # names in error messages; with them, equal reasons would count separately
_ASPECT_EDGES = [0.1, 0.25, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 4.0, 10.0]
_SIDE_EDGES = [0, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
_SHOWN_REASONS = 10
# Formats of pictures that people have and that are not read, by their beginning.
_OTHER_FORMATS = {
    "HEIC": re.compile(rb"(?s).{4}ftyp(?:hei|hev|mif1|msf1)"),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "SVG": re.compile(rb"(?s)\s*(?:<\?xml.{0,500}?)?<svg"),
    "PSD": re.compile(rb"8BPS"),
}


@dataclass(frozen=True)
class Limits:
    """Limits of a usable image. min_side: pixels, for both sides (M2.6: more than 80). max_aspect: longer / shorter."""

    min_side: int = 81
    max_aspect: float = MAX_ASPECT
    max_pixels: int = MAX_PIXELS


@dataclass
class Tally:
    """Counts for one unit or many: kept samples, dropped samples by reason, shapes of kept targets."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)  # side of a square with the same area, rounded to 64
    aspects: Counter[int] = field(default_factory=Counter)  # width / height, as a bin of _ASPECT_EDGES
    tasks: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.kept += other.kept
        for name in ("dropped", "sides", "aspects", "tasks"):
            getattr(self, name).update(getattr(other, name))

    @property
    def total(self) -> int:
        return self.kept + sum(self.dropped.values())

    @property
    def bad_share(self) -> float:
        return sum(self.dropped.values()) / self.total if self.total else 0.0

    def save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def to_dict(self) -> dict[str, Any]:
        return {"kept": self.kept} | {
            name: {str(k): v for k, v in sorted(getattr(self, name).items())}
            for name in ("dropped", "sides", "aspects", "tasks")
        }

    def top_reasons(self) -> dict[str, int]:
        """Samples dropped for each of the most frequent reasons, and for all other reasons together."""
        shown = dict(self.dropped.most_common(_SHOWN_REASONS))
        if others := len(self.dropped) - len(shown):
            shown[f"{others} other reasons"] = sum(self.dropped.values()) - sum(shown.values())
        return shown

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Tally:
        numbers = {name: Counter({int(k): v for k, v in content[name].items()}) for name in ("sides", "aspects")}
        words = {name: Counter(content[name]) for name in ("dropped", "tasks")}
        return cls(content["kept"], words["dropped"], numbers["sides"], numbers["aspects"], words["tasks"])

    @classmethod
    def load(cls, path: Path) -> Tally:
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged; delete it, and the same command converts its unit again") from error


# ---------------------------------------------------------------- one sample


def check_sample(sample: RawSample, limits: Limits) -> tuple[Record | None, str]:
    """The record made from a sample, or None and why it is unusable. Similar faults give the same reason."""
    sample = _one_caption(sample)
    if reason := sample.fault or _text_fault(sample):
        return None, reason
    if sample.task == "edit" and not sample.references:
        return None, "edit without source image"
    if sample.task != "edit" and sample.references:
        return None, "source images in a task that has none"
    targets = () if sample.is_prompt else (sample.image,)
    for what, data in (*(("target", data) for data in targets), *(("source", data) for data in sample.references)):
        if reason := image_fault(data, limits):
            return None, f"{what}: {reason}"
    target, *_ = *(data for data in targets if isinstance(data, bytes)), None
    references = tuple(data for data in sample.references if isinstance(data, bytes))
    if sum(map(len, (target or b"", *references))) > MAX_SAMPLE:
        return None, f"images: {TOO_LARGE}"
    answer = sample.answer if isinstance(sample.answer, str) and sample.answer.strip() else sample.prompt
    id, own = _cleaned(sample.id), _cleaned(sample.source)
    return Record(id, sample.task, sample.prompt, answer, target, references, own), ""


def has_more_captions(sample: RawSample) -> bool:
    """Whether a sample gives several captions, of which only the first is used."""
    return isinstance(sample.prompt, list) and sum(isinstance(text, str) for text in sample.prompt) > 1


def _one_caption(sample: RawSample) -> RawSample:
    """The sample with the first caption that is not empty, if it gives a list of them."""
    given = as_list(sample.prompt)
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        return sample
    first = next((text for text in given if text.strip()), None)
    return replace(sample, prompt=first, answer=first if sample.answer == sample.prompt else sample.answer)


def _text_fault(sample: RawSample) -> str:
    """Why the task, prompt or answer of a sample is unusable, or "" if they are usable."""
    if sample.task not in TASKS:
        return f"task is not one of {', '.join(TASKS)}"
    if isinstance(sample.prompt, UriError):
        return f"caption: cannot be read ({_why(sample.prompt)})"
    if not isinstance(sample.prompt, str) or not sample.prompt.strip():
        return "empty caption" if sample.prompt is None or isinstance(sample.prompt, str) else "caption: no text"
    for text in (sample.prompt, sample.answer if isinstance(sample.answer, str) else ""):
        if len(text) > MAX_TEXT:
            return f"caption: more than {MAX_TEXT:,} letters"
        if not is_unicode(text):
            return "caption: not UTF-8 text"
    return ""


def _why(error: UriError) -> str:
    return _QUOTED.sub("...", error.why)


def _cleaned(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def image_fault(data: bytes | UriError | None, limits: Limits) -> str:
    """Why an encoded image is unusable, or "" if it is usable. The header is checked before the pixels are decoded."""
    if isinstance(data, UriError):
        return MISSING if data.why == MISSING else f"cannot be read ({_why(data)})"
    if data is None:
        return MISSING
    if not data:
        return "no bytes"
    width, height = header_size(data)
    if width is not None and height is not None:
        if width * height > limits.max_pixels:
            return "too many pixels"
        if min(width, height) < limits.min_side:
            return f"a side below {limits.min_side} px"
        if max(width, height) > limits.max_aspect * min(width, height):
            return f"sides in a ratio above {limits.max_aspect:g}"
    try:
        check_pixels(data)
    except ValueError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            return "too many pixels"
        if width is None:
            return _no_image(data)
        if isinstance(error.__cause__, UnknownWhiteError):
            return "greys whose white is unknown"
        return "truncated" if "truncated" in str(error).lower() else "damaged"
    return ""


def _no_image(data: bytes) -> str:
    """Why bytes are no image that is read: what they are instead, if their beginning tells."""
    if is_lfs_pointer(data):
        return "a pointer of Git LFS, not the file itself"
    other = next((name for name, begins in _OTHER_FORMATS.items() if begins.match(data)), "")
    return f"an image in a format that is not read ({other})" if other else "not an image"


# ---------------------------------------------------------------- one unit


def shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.parquet"


def tally_path(out: Path, number: int) -> Path:
    return out / "tally" / f"{number:06d}.json"


def convert_unit(raw: RawData, unit: Unit, out: Path, limits: Limits, seed: int) -> Tally:
    """Convert one unit. (seed, unit) determines the random order of its records."""
    with writing(out):
        return _convert_unit(raw, unit, out, limits, seed)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn file system errors into a UserError while a conversion writes to `out`."""
    try:
        yield
    except OSError as error:
        why = " ".join(str(error.strerror or error).split())
        raise UserError(
            f"{out}: cannot write ({why}); make room or mend the folder, and run the same command again"
        ) from error


def _convert_unit(raw: RawData, unit: Unit, out: Path, limits: Limits, seed: int) -> Tally:
    tally = Tally()
    quarantine = out / "quarantine" / f"{unit.number:06d}.jsonl"
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    (out / "tally").mkdir(exist_ok=True)
    seen: set[str] = set()
    order = random.Random(f"{seed}/{unit.number}")
    shard = RecordWriter(shard_path(out, unit.number), ROW_GROUP, order.shuffle)
    with shard, quarantine.open("w", encoding="utf-8") as bad:
        for sample in read_unit(raw, unit):
            record, reason = check_sample(sample, limits)
            if record is not None and record.id in seen:
                record, reason = None, "id used twice"
            if record is None:
                tally.dropped[reason.partition(":")[0] if sample.fault else reason] += 1
                bad.write(json.dumps(_quarantined(sample, reason)) + "\n")
            else:
                seen.add(record.id)
                shard.add(record)
                _count(tally, record)
            del sample, record  # before the next one is read: each may hold 160 MiB and more
    if not tally.dropped:
        quarantine.unlink()
    tally.save(tally_path(out, unit.number))
    return tally


def _quarantined(sample: RawSample, reason: str) -> dict[str, Any]:
    """The line of the quarantine: where the sample is, and the name of each unreadable file with the reason."""
    names = {"place": sample.place, "id": str(sample.id), "reason": reason}
    given = (sample.prompt, sample.image, *sample.references)
    found = [str(data) for data in given if isinstance(data, UriError)]
    return {key: _quarantined_text(value) for key, value in names.items()} | ({"unread": found} if found else {})


def _quarantined_text(text: str) -> str:
    """A text without secrets, and cut: ids and places have names from the data, which may hold anything."""
    shown = masked(text[: 10 * _LONGEST])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}... ({len(text):,} letters)"


def _count(tally: Tally, record: Record) -> None:
    tally.kept += 1
    tally.tasks[record.task] += 1
    if record.image is None:
        return
    width, height = header_size(record.image)
    assert width and height  # `check_sample` has checked the image
    tally.sides[max(64, 64 * round(math.sqrt(width * height) / 64))] += 1
    tally.aspects[int(np.searchsorted(_ASPECT_EDGES, width / height))] += 1


# ---------------------------------------------------------------- all units


def check_folders(path: Path, out: Path) -> None:
    """Raise UserError if `out` is a file, or if one of `out` and the raw data's `path` lies inside the other."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder to write to")
    given, made = path.resolve(), out.resolve()
    if given.is_relative_to(made) or made.is_relative_to(given):
        inner, outer = (path, out) if given.is_relative_to(made) else (out, path)
        raise UserError(f"{inner} lies in {outer}, whose files would be mixed with it; give a folder elsewhere")


def write_plan(out: Path, raw: RawData, limits: Limits, rows: int, seed: int, units: list[Unit]) -> None:
    """Write plan.json: what is converted and how. Raises UserError if `out` already holds another conversion."""
    plan = {
        "source": str(raw.path.resolve()),
        "name": raw.name,
        "form": raw.form,
        "task": raw.task,
        "images": str(raw.images.resolve()) if raw.images else None,
        "caption_key": raw.caption_key,
        "columns": dict(raw.columns),
        "allow": list(raw.allow),
        "limits": vars(limits),
        "rows": rows,
        "seed": seed,
        "units": [_unit_plan(raw, unit) for unit in units],
    }
    path = out / "plan.json"
    if path.exists():
        _compare_plans(out, _read_plan(path), plan)
        return
    partial = path.with_name("plan.json.partial")
    if out.exists() and any(entry != partial for entry in out.iterdir()):
        raise UserError(f"{out} is not empty and not a conversion; give another folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in plan.items())
        partial.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        partial.replace(path)


def _unit_plan(raw: RawData, unit: Unit) -> list[Any]:
    """Where a unit comes from: file, file size, first and last row. For pictures: their names."""
    file = Path(unit.file)
    if unit.entries:
        names = hashlib.blake2b("\n".join(unit.entries).encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return [f"{unit.entries[0]} and more (names {names})", len(unit.entries), unit.first, unit.last]
    name = file.relative_to(raw.path).as_posix() if raw.path.is_dir() else file.name
    try:
        return [name, file.stat().st_size, unit.first, unit.last]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        plan = None
    if not isinstance(plan, dict):
        raise UserError(f"{path}: damaged; delete {path.parent} and convert again, or give another folder")
    return plan


def _compare_plans(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError if the plan in `out` differs from the new one, naming the first difference."""
    changed = next((key for key in now if key not in before or before[key] != now[key]), None)
    if changed is None:
        return
    was, new = before.get(changed), now[changed]
    if changed == "units" and isinstance(was, list):
        pairs = enumerate(itertools.zip_longest(was, new), start=1)
        number, was, new = next((number, was, new) for number, (was, new) in pairs if was != new)
        changed = f"SOURCE has changed, unit {number}"
        size = "pictures" if now["form"] == "folder" else "bytes"
        was, new = (f"{unit[0]} of {unit[1]:,} {size}, {unit[2:]}" if unit else "none" for unit in (was, new))
    raise UserError(f"{out} holds another conversion ({changed}: {was!r}, now {new!r}); give another folder")


def unfinished(out: Path, units: Iterable[Unit]) -> list[Unit]:
    return [unit for unit in units if not tally_path(out, unit.number).exists()]


def total_tally(out: Path) -> Tally:
    total = Tally()
    for path in sorted((out / "tally").glob("*.json")):
        total.add(Tally.load(path))
    return total


# ---------------------------------------------------------------- report


def write_report(out: Path) -> Tally:
    """Write report.json to `out`, and histograms.png and samples.png (random kept records) if it has images.

    Returns the total tally.
    """
    total = total_tally(out)
    with writing(out):
        (out / "report.json").write_text(json.dumps(total.to_dict(), indent=1) + "\n", encoding="utf-8")
        if total.sides:  # prompts have no images
            draw_histograms(total, out / "histograms.png")
            draw_samples(out, out / "samples.png")
    return total


def draw_histograms(tally: Tally, path: Path) -> None:
    """Draw bar charts of sizes, aspect ratios and reasons for dropping samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    edges = ["<0.1", *(f"{a:g}-{b:g}" for a, b in itertools.pairwise(_ASPECT_EDGES)), ">10"]
    sides = Counter[int]()
    for side, count in tally.sides.items():
        sides[bisect(_SIDE_EDGES, side) - 1] += count
    ranges = [f"{low}-{high - 1}" for low, high in itertools.pairwise(_SIDE_EDGES)]
    ranges = [f"<{_SIDE_EDGES[1]}", *ranges[1:], f">={_SIDE_EDGES[-1]}"]
    reasons = Counter[str]()
    for reason, count in tally.top_reasons().items():  # reasons that shorten to one label share a bar
        reasons[textwrap.fill(textwrap.shorten(reason, 62, placeholder=" ..."), 34, max_lines=2)] += count
    panels = [
        ("edge of the square of equal area (px)", {ranges[k]: v for k, v in sorted(sides.items())}),
        ("width / height", {edges[k]: v for k, v in sorted(tally.aspects.items())}),
        (f"dropped: {tally.bad_share:.1%} of {tally.total:,}", reasons),
    ]
    panels = [(title, bars) for title, bars in panels if bars]
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, bars) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.barh(list(bars), list(bars.values()), color=f"C{i}")
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_samples(out: Path, path: Path, count: int = 24) -> None:
    """Draw a sheet of random kept records with their prompts, and the references of edits beside them."""
    from deepgen.tracking.grids import image_grid

    records = list(_some_records(out, count))
    references = [_small(r.references[0]) if r.references else None for r in records]
    images = [_small(r.image) for r in records if r.image is not None]
    image_grid(images, [r.prompt for r in records], columns=6, sources=references).save(path)


def _small(data: bytes | str) -> np.ndarray:
    """An image for the sheet: uint8 [H, W, 3], sides of at most 512."""
    image = open_image(data)
    image.thumbnail((512, 512))
    return np.array(image)


def _some_records(out: Path, count: int) -> Iterator[Record]:
    """Records of some row groups, which are read one at a time."""
    shards = sorted(out.glob("shard-*.parquet"))
    chosen = random.Random(0).sample(shards, min(4, len(shards)))
    for shard in chosen:
        left = math.ceil(count / len(chosen))
        parquet = pq.ParquetFile(shard, pre_buffer=False)
        groups = range(parquet.num_row_groups)
        for group in random.Random(0).sample(groups, min(left, len(groups))):
            table = parquet.read_row_group(group, columns=SCHEMA.names)
            rows = random.Random(0).sample(range(table.num_rows), min(math.ceil(left / len(groups)), table.num_rows))
            for row in rows:
                (found,) = to_rows(table.slice(row, 1), shard)
                yield check_row(found, f"{shard}, row group {group + 1}", out, Reach())
