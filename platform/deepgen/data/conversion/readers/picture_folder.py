"""Reads folders of pictures with captions beside them: 1.jpg with 1.txt (or 1.jpg.txt), 1.caption or 1.json."""

from __future__ import annotations

from pathlib import Path

from deepgen.data.conversion.readers.image_values import image_bytes
from deepgen.data.conversion.readers.raw_sample import CAPTION_SUFFIXES, RawData, RawSample
from deepgen.data.conversion.readers.row_forms import JSON_BYTES, first_caption


def picture_sample(raw: RawData, folder: Path, name: str) -> RawSample:
    """The sample of one picture. `name`: its path below `folder`."""
    file = folder / name
    captions = [path for suffix in CAPTION_SUFFIXES if (path := _beside(file, suffix)) is not None]
    fault = "" if captions else f"no caption beside the picture: {' or '.join(file.stem + s for s in CAPTION_SUFFIXES)}"
    contents = ((image_bytes(str(one.absolute()), raw, file, JSON_BYTES), one.suffix.lower()) for one in captions)
    text = first_caption(contents, raw.caption_key)
    image = image_bytes(str(file.absolute()), raw, file)
    return RawSample(name, raw.task, text, text, image, (), str(file), raw.name, fault)


def _beside(picture: Path, suffix: str) -> Path | None:
    """The file 1.txt or 1.jpg.txt of a picture 1.jpg, its suffix in capitals or not; None if there is none."""
    names = (picture.with_suffix(""), picture)
    spellings = (suffix, suffix.upper(), suffix.title())
    found = (name.with_name(name.name + spelling) for name in names for spelling in spellings)
    return next((path for path in found if path.is_file()), None)
