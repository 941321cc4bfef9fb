"""A folder of drawn pictures: a PNG each, which says how it was drawn, a sheet of the first ones, and a table.

A file appears when it is whole, so that an interrupted program leaves only pictures, and the next start draws what is
missing. `drawing.json` holds the settings: another request does not go into the same folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deepgen.data.images import decode_image
from deepgen.data.records import Record
from deepgen.errors import UserError, writing
from deepgen.tracking.grids import image_grid

MANIFEST, TABLE, SHEET = "drawing.json", "pictures.parquet", "sheet.png"
ON_THE_SHEET = 48
_LONGEST = 60  # letters of an id in a file's name
_writing = partial(writing, then="run the same command again", key="--out")


class PictureFolder:
    """The pictures of one request. settings: what decides them besides prompts, JSON values."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._settings = folder, dict(settings)

    def open(self) -> None:
        """Make the folder, or go on in it. Raises UserError if it holds pictures of other settings."""
        manifest = self.folder / MANIFEST
        if manifest.is_file():
            try:
                held = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{manifest}: not JSON ({error}); give another --out") from error
            for key in {**held, **self._settings}:
                if held.get(key) != self._settings.get(key):
                    raise UserError(
                        f"--out: {self.folder} has pictures with {key} {held.get(key)!r}, now "
                        f"{self._settings.get(key)!r}; allowed: the same settings, or another folder"
                    )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--out: {self.folder} is there and has no {MANIFEST}; give an empty or a new folder")
        with _writing("the pictures", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(manifest, json.dumps(self._settings, indent=2, ensure_ascii=False).encode())

    def path(self, record: Record, sample: int) -> Path:
        name = re.sub(r"[^\w.-]+", "-", record.id).strip(".-")[:_LONGEST]
        if name != record.id:  # two ids may look the same without the letters that a file's name cannot have
            name += f"-{hashlib.blake2b(record.id.encode(), digest_size=3).hexdigest()}"
        return self.folder / f"{name}-{sample}.png"

    def missing(self, record: Record, samples: Sequence[int]) -> tuple[int, ...]:
        """The samples of a prompt that are not there yet."""
        return tuple(sample for sample in samples if not self.path(record, sample).is_file())

    def save(self, record: Record, sample: int, picture: np.ndarray) -> None:
        """Write one picture, uint8 [H, W, 3]. Raises UserError for a full disk."""
        info, stream = PngInfo(), io.BytesIO()
        for key, value in {"prompt": record.prompt, "id": record.id, "sample": sample, **self._settings}.items():
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
        Image.fromarray(picture).save(stream, "PNG", pnginfo=info)
        path = self.path(record, sample)
        with _writing("a picture", path):
            self._write(path, stream.getvalue())

    def finish(self, records: Sequence[Record], samples: Sequence[int]) -> int:
        """Write the table of all pictures that are there, and the sheet. Returns how many there are."""
        found = [(record, sample) for record in records for sample in samples if self.path(record, sample).is_file()]
        if not found:
            return 0
        rows = [
            {
                "file": self.path(record, sample).name,
                "id": record.id,
                "task": record.task,
                "prompt": record.prompt,
                "sample": sample,
                **{
                    key: value if isinstance(value, str) else json.dumps(value) for key, value in self._settings.items()
                },
            }
            for record, sample in found
        ]
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), stream)
        shown = found[:ON_THE_SHEET]
        pictures = [decode_image(self.path(*one).read_bytes()) for one in shown]
        sources = [decode_image(record.references[0]) if record.references else None for record, _ in shown]
        columns = len(samples) if 1 < len(samples) <= 8 else 6
        sheet = io.BytesIO()
        image_grid(pictures, [record.prompt for record, _ in shown], columns=columns, sources=sources).save(
            sheet, "PNG"
        )
        with _writing("the table of pictures", self.folder):
            self._write(self.folder / TABLE, stream.getvalue())
            self._write(self.folder / SHEET, sheet.getvalue())
        return len(found)

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
