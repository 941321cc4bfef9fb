"""A folder of drawn pictures: a PNG each, which says how it was drawn, a sheet of the first ones, and a table.

A file appears when it is whole, so that an interrupted program leaves only pictures, and the next start draws what is
missing. `drawing.json` holds the settings: another request does not go into the same folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deepgen.config.schema.paths import exists
from deepgen.data.images import DECODE_ERRORS, decode_image, read_header
from deepgen.data.records import Record
from deepgen.drawing.prompts import sources_of
from deepgen.errors import UserError, writing
from deepgen.file_lock import file_lock
from deepgen.seeds import sample_seed
from deepgen.tracking.grids import image_grid

MANIFEST, TABLE, SHEET, LOCK = "drawing.json", "pictures.parquet", "sheet.png", ".lock"
ON_THE_SHEET = 48
_END = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG
_LONGEST = 100  # bytes of an id in a file's name
_THEN = "run the same command again"
_writing = partial(writing, then=_THEN, key="--out")


class PictureFolder:
    """The pictures of one request. The references of all records are bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settings: dict[str, Any] = {}

    def check(self) -> None:
        """Raise UserError if the folder holds something else than pictures of ours."""
        if not exists(self.folder) or (self.folder / MANIFEST).is_file():
            return
        if not self.folder.is_dir() or any(path.name != LOCK for path in self.folder.iterdir()):
            raise UserError(f"--out: {self.folder} is there and has no {MANIFEST}; give an empty or a new folder")

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder, or go on in it, and keep others out until the context ends.

        settings: what decides the pictures besides prompts, JSON values.

        Raises UserError if it holds pictures of other settings, or if another process draws into it.
        """
        self.check()
        self._settings = json.loads(json.dumps(settings))
        with file_lock(self.folder / LOCK, "--out", "the pictures", self._taken, _THEN):
            manifest = self.folder / MANIFEST
            if manifest.is_file() and any(path.name != SHEET for path in self.folder.glob("*.png")):
                self._compare(manifest)
            with _writing("the pictures", self.folder):
                self._write(manifest, json.dumps(self._settings, indent=2, ensure_ascii=False).encode())
            yield

    def _taken(self, holder: str) -> str:
        return f"--out: {self.folder} is being drawn into, {holder}; allowed: another folder, or this one after it"

    def _compare(self, manifest: Path) -> None:
        try:
            held = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"--out: {manifest} is not JSON ({error}); give another folder") from error
        if not isinstance(held, dict):
            raise UserError(f"--out: {manifest} holds no settings; give another folder")
        for key in {**held, **self._settings}:
            if held.get(key) != self._settings.get(key):
                raise UserError(
                    f"--out: {self.folder} has pictures with {key} {held.get(key)!r}, now "
                    f"{self._settings.get(key)!r}; allowed: the same settings, or another folder"
                )

    def path(self, record: Record, sample: int) -> Path:
        name = re.sub(r"[^\w.-]+", "-", record.id).strip(".-").encode()[:_LONGEST].decode(errors="ignore")
        if name != record.id:  # two ids may look the same without the letters that a file's name cannot have
            name += f"-{hashlib.blake2b(record.id.encode(), digest_size=3).hexdigest()}"
        return self.folder / f"{name}-{sample}.png"

    def missing(self, record: Record, samples: Sequence[int]) -> tuple[int, ...]:
        """The samples of a prompt that are not there yet, or not readable.

        Raises UserError if there is a picture of another prompt, or of other sources, with this id.
        """
        found, wanted = [], _told(record)
        for sample in samples:
            path = self.path(record, sample)
            there = _info(path)
            for key, value in wanted.items() if there else ():
                if there.get(key) != value:
                    raise UserError(
                        f"--out: {path} has {key} {there.get(key)!r}, but {record.id!r} now has {value!r}; remove it, "
                        "or give another folder or id"
                    )
            if not there:
                found.append(sample)
        return tuple(found)

    def save(self, record: Record, sample: int, picture: np.ndarray) -> None:
        """Write one picture, uint8 [H, W, 3]. Raises UserError for a full disk."""
        info, stream = PngInfo(), io.BytesIO()
        noise_seed = sample_seed(int(self._settings["seed"]), record.id, 0, sample)
        for key, value in {**_told(record), "sample": sample, "noise_seed": noise_seed, **self._settings}.items():
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
        Image.fromarray(picture).save(stream, "PNG", pnginfo=info)
        path = self.path(record, sample)
        with _writing("a picture", path):
            self._write(path, stream.getvalue())

    def finish(self, records: Sequence[Record], samples: Sequence[int]) -> int:
        """Write the table of all pictures here, and the sheet of these. Returns how many of these there are."""
        told = {path: info for path in sorted(self.folder.glob("*.png")) if (info := _info(path))}
        found = [(record, sample) for record in records for sample in samples if self.path(record, sample) in told]
        rows = [_row(path, told[path]) for path in dict.fromkeys([*(self.path(*one) for one in found), *told])]
        if not rows:
            return 0
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), table)
        with _writing("the table of pictures", self.folder):
            self._write(self.folder / TABLE, table.getvalue())
            if found:
                self._write(self.folder / SHEET, self._sheet(found[:ON_THE_SHEET], len(samples)))
        return len(found)

    def _sheet(self, shown: Sequence[tuple[Record, int]], samples: int) -> bytes:
        pictures = [decode_image(self.path(*one).read_bytes()) for one in shown]
        sources = [decode_image(record.references[0]) if record.references else None for record, _ in shown]
        columns, stream = samples if 1 < samples <= 8 else 6, io.BytesIO()
        prompts = [record.prompt for record, _ in shown]
        image_grid(pictures, prompts, columns=columns, sources=sources).save(stream, "PNG")
        return stream.getvalue()

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _told(record: Record) -> dict[str, str]:
    """What a picture says of its record."""
    return {"id": record.id, "task": record.task, "prompt": record.prompt, "sources": sources_of(record)}


def _info(path: Path) -> dict[str, str]:
    """What a picture of ours says of itself; {} if it is not there, cut off, or not ours."""
    try:
        data = path.read_bytes()
        found = {str(key): str(value) for key, value in read_header(data).info.items()}
    except DECODE_ERRORS:
        return {}
    return found if "noise_seed" in found and data.endswith(_END) else {}


def _row(path: Path, info: Mapping[str, str]) -> dict[str, Any]:
    return {"file": path.name, **info, "sample": int(info["sample"]), "noise_seed": int(info["noise_seed"])}
