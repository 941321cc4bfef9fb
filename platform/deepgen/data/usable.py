"""Finds the usable prompts and held-out records before anything starts, by the same rules as for training records.

All are checked in advance, not when they are drawn. Otherwise an unusable prompt would leave a learner rank without
work, and the run would occupy GPUs before it fails on too many bad rows. One thread per CPU decodes images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from deepgen.config import Settings, UserError
from deepgen.data.images import FORMATS, usable_image
from deepgen.data.parquet import parquet_files, read_rows
from deepgen.data.quarantine import FILES, BadRow, Quarantine, place_of, rows_in
from deepgen.data.records import Record, RecordError, check_texts
from deepgen.errors import writing
from deepgen.fingerprint import file_checksum

JUDGED = ".judged"  # suffix of a file beside the quarantine: a hash of what has been checked
Place = tuple[str, int]  # file and row, from 1
Choose = Callable[[Sequence[Record]], Sequence[Record]]


def usable_records(
    settings: Settings, key: str, choose: Choose | None = None, say: Callable[[str], None] = print
) -> list[tuple[Place, Record]]:
    """The usable records of data.prompts or data.heldout (``key``), in order, each with its place.

    choose: picks the records that the run needs; only their images are opened.

    A run checks its records once. A later call, in another process or after a resume, opens no image and leaves out
    the same rows.

    Raises UserError if too many rows are bad (``deepgen.data.quarantine``), if no record is usable, or if the file
    cannot be read as records.
    """
    given: Path = getattr(settings.data, key.removeprefix("data."))
    rows = read_rows(given, settings.data.allow)
    found = [((row.file, row.number), row.record) for row in rows if isinstance(row.record, Record)]
    wanted = {record.id for record in choose([record for _, record in found])} if choose else None
    chosen = [(place, record) for place, record in found if wanted is None or record.id in wanted]
    path = settings.run.folder / FILES[key]
    reserved = _reserved_tokens(settings)
    marker, state = path.with_suffix(JUDGED), _state(settings, given, [record.id for _, record in chosen], reserved)
    out, whole = rows_in(path)
    if whole and marker.exists() and marker.read_text(encoding="utf-8") == state:
        return [(place, record) for place, record in chosen if place_of(*place) not in out]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(pool.map(partial(_fault, reserved=reserved), (record for _, record in chosen)))
    bad = [BadRow(r.file, r.number, r.record.id, r.record.reason) for r in rows if isinstance(r.record, RecordError)]
    judgement = list(zip(chosen, faults, strict=True))
    bad += [BadRow(*place, record.id, fault) for (place, record), fault in judgement if fault]
    quarantine = Quarantine(settings.data.max_bad_share, settings.run.folder, key=key, say=say)
    quarantine.add(len(rows) - len(found) + len(chosen), bad)
    usable = [one for one, fault in judgement if not fault]
    if not usable:
        raise UserError(f"{key}: no record of {given} can be used; see {path}")
    with writing(f"that {key} is checked", marker):
        path.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(state, encoding="utf-8")
    return usable


def _state(settings: Settings, given: Path, ids: Sequence[str], reserved: Sequence[str]) -> str:
    """A hash that changes with the files, the chosen records or the rules that judge them.

    Not with the folder or the files' times: both differ between the nodes of a cluster that have a checkout each.
    """
    files = parquet_files(given) if given.is_dir() else [given]
    facts = [(file.name, file_checksum(file)) for file in files]
    judged_by = [settings.data.max_bad_share, *settings.data.allow, *FORMATS, *reserved]
    return hashlib.blake2b(json.dumps([facts, list(ids), judged_by]).encode(), digest_size=16).hexdigest()


def left_out(settings: Settings, *keys: str) -> dict[str, float]:
    """Metrics: the number of records of each key that this run has left out. Keys with none are omitted."""
    counts = {key: len(rows_in(settings.run.folder / FILES[key])[0]) for key in keys}
    return {f"data/quarantined_{key.removeprefix('data.')}": float(count) for key, count in counts.items() if count}


def _fault(record: Record, reserved: Sequence[str]) -> str:
    """Why a record is unusable, or "" if it is usable."""
    try:
        check_texts(record, reserved)
        for slot, data in enumerate(record.references, start=1):
            usable_image(data, f"reference {slot}")
    except ValueError as error:
        return str(error)
    return ""


def _reserved_tokens(settings: Settings) -> list[str]:
    """The special tokens of every model that reads the records' texts: the policy, and those of the rewards in use."""
    pools = [settings.rewards.pools[name] for name in settings.rewards.used()]
    folders = [Path(settings.model.weights) / "tokenizer", *(path for p in pools for path in p.input_paths().values())]
    return list(dict.fromkeys(token for folder in folders for token in special_tokens(folder)))


def special_tokens(folder: Path) -> list[str]:
    """The special tokens of the tokenizer in a folder, read from its file because loading the tokenizer takes seconds.

    Without such a file the list is empty; policy and judge then refuse texts with special tokens themselves.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        # Some CLIPs pad with "!", which is a letter like any other.
        return [token["content"] for token in added if token["special"] and len(token["content"]) > 1]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file}: not a tokenizer of the tokenizers library ({error!r})") from error
