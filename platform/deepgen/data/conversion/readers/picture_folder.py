"""Reads folders of pictures with captions beside them: 1.jpg with 1.txt, 1.caption or 1.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepgen.data.conversion.readers.image_values import image_bytes
from deepgen.data.conversion.readers.raw_sample import CAPTION_SUFFIXES, RawData, RawSample
from deepgen.data.conversion.readers.row_forms import JSON_BYTES, caption_text


def picture_sample(raw: RawData, folder: Path, name: str) -> RawSample:
    """The sample of one picture. `name`: its path below `folder`."""
    file = folder / name
    captions = [path for suffix in CAPTION_SUFFIXES if (path := _beside(file, suffix)).is_file()]
    text: Any = None
    fault = "" if captions else f"no caption beside the picture: {' or '.join(file.stem + s for s in CAPTION_SUFFIXES)}"
    if captions:
        data = image_bytes(str(captions[0].absolute()), raw, file, JSON_BYTES)
        text = caption_text(data, captions[0].suffix.lower(), raw.caption_key) if isinstance(data, bytes) else data
    image = image_bytes(str(file.absolute()), raw, file)
    return RawSample(name, raw.task, text, text, image, (), str(file), raw.name, fault)


def _beside(picture: Path, suffix: str) -> Path:
    """The file of the same name with another suffix, in capitals or not."""
    usual = picture.with_suffix(suffix)
    return usual if usual.exists() else picture.with_suffix(suffix.upper())
