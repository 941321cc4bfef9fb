"""Only pictures in accepted formats, judged by their bytes, are decoded, and no decoder starts a program."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from deepgen.config import load_settings
from deepgen.data.conversion.convert_units import image_fault
from deepgen.data.conversion.readers.raw_sample import FOREIGN_SUFFIXES, IMAGE_SUFFIXES
from deepgen.data.images import FORMATS, decode_image, header_size
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import write_records
from deepgen.data.records import Record, RecordError
from deepgen.data.usable import usable_records
from tests.data.test_convert import LIMITS, convert, reasons
from tests.data.test_records import EDIT, GOOD, PICTURE
from tests.data.test_usable import PROMPT

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) print showpage\n%%EOF\n"
EPS = {
    "text": POSTSCRIPT,
    "binary": struct.pack("<LLLLLLLL", 0xC6D3D0C5, 32, len(POSTSCRIPT), 0, 0, 0, 0, 0xFFFF) + POSTSCRIPT,  # DOS EPS
}
each_eps = pytest.mark.parametrize("eps", EPS.values(), ids=EPS.keys())
REFUSED = f"not a readable image (cannot identify image file; allowed: {', '.join(FORMATS)})"


@pytest.fixture(autouse=True)
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting any program, or Pillow's call of Ghostscript, fails the test."""

    def started(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail(f"a program was started: {args}")

    for place, name in [(subprocess, "Popen"), (os, "posix_spawn"), (os, "posix_spawnp"), (os, "system"), (os, "fork")]:
        monkeypatch.setattr(place, name, started)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)


def test_pillow_left_to_itself_would_start_a_program() -> None:
    """If it did not, the tests below would prove nothing."""
    for eps in EPS.values():
        with pytest.raises(pytest.fail.Exception, match="a program was started"):
            Image.open(io.BytesIO(eps)).load()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_accepted_formats_are_read(kind: str) -> None:
    stream = io.BytesIO()
    pixels = np.full((24, 32, 3), 128, dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    assert header_size(stream.getvalue()) == (32, 24)
    assert np.abs(decode_image(stream.getvalue()).astype(int) - pixels).max() < 4


def test_names_taken_for_images_in_tars_are_of_accepted_formats() -> None:
    taken = set(IMAGE_SUFFIXES) - set(FOREIGN_SUFFIXES)
    assert {Image.registered_extensions()[suffix] for suffix in taken} == set(FORMATS)


@each_eps
@pytest.mark.parametrize("name", ["", "picture.eps", "picture.png", "picture.jpg"], ids=lambda name: name or "bytes")
@pytest.mark.parametrize("slot", ["image", "reference 2"])
def test_postscript_in_training_records(tmp_path: Path, eps: bytes, name: str, slot: str) -> None:
    if name:
        (tmp_path / name).write_bytes(eps)
        (tmp_path / "sound.png").write_bytes(PICTURE)
    bad, sound = (name, "sound.png") if name else (eps, PICTURE)
    edit = replace(EDIT, image=sound, references=(sound, bad))
    write_records(tmp_path / "x.parquet", [edit if slot == "reference 2" else replace(GOOD, image=bad)])
    with pytest.raises(RecordError) as caught:
        TrainingSet(ParquetStore(tmp_path / "x.parquet"), 64).sample(0)
    assert caught.value.reason == f"{slot} is {REFUSED}"


@each_eps
@pytest.mark.parametrize("key", ["data.prompts", "data.heldout"])
def test_postscript_in_references_of_prompts(tmp_path: Path, eps: bytes, key: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "picture.png").write_bytes(eps)
    bad = [replace(EDIT, id="b0", image=None, references=(PICTURE, eps))]
    write_records(tmp_path / "x" / "bytes.parquet", [PROMPT, *bad])
    named = replace(EDIT, id="b1", image=None, references=(str(tmp_path / "x" / "picture.png"),))
    write_records(tmp_path / "x" / "named.parquet", [named])
    settings = load_settings(None, [f"run.dir={tmp_path}", "run.name=a", f"{key}={tmp_path / 'x'}"])
    assert [record.id for _, record in usable_records(settings, key)] == [PROMPT.id]
    quarantine = tmp_path / "a" / f"quarantine-{key.removeprefix('data.')}.jsonl"
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("b0", f"reference 2 is {REFUSED}"),
        ("b1", f"reference 1 is {REFUSED}"),
    ]


@each_eps
def test_postscript_in_conversion(tmp_path: Path, eps: bytes) -> None:
    assert image_fault(eps, LIMITS) == "not an image"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "picture.png").write_bytes(eps)
    (tmp_path / "in" / "list.json").write_text(json.dumps([{"txt": "a cat", "image": "picture.png"}]))
    assert convert(tmp_path / "in" / "list.json", tmp_path / "out") == []
    assert reasons(tmp_path / "out") == ["target: not an image"]
    records = [Record(f"r{i}", "t2i", "a cat", "a cat", eps, (), "here") for i in range(2)]
    write_records(tmp_path / "records" / "a.parquet", records)
    assert convert(tmp_path / "records", tmp_path / "again") == []
    assert reasons(tmp_path / "again") == ["target: not an image"] * 2


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "MemoryError"),
        (AssertionError(), "AssertionError"),
        (subprocess.CalledProcessError(1, "gs"), "Command 'gs' returned non-zero exit status 1."),
        (subprocess.TimeoutExpired("gs", 5), "Command 'gs' timed out after 5 seconds"),
        (Image.DecompressionBombError("too large"), "too large"),
        (struct.error("unpack"), "unpack"),
        (SyntaxError("broken PNG file"), "broken PNG file"),
        (EOFError("no more frames"), "no more frames"),
        (KeyError(3), "3"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("method", ["load", "convert"])
def test_every_failure_of_a_decoder_is_a_damaged_picture(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str, method: str
) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(stream, "PNG")

    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load" if method == "load" else "PIL.Image.Image.convert", fail)
    with pytest.raises(ValueError, match="not a readable image") as caught:
        decode_image(stream.getvalue())
    assert str(caught.value) == f"not a readable image ({why})"
    assert image_fault(stream.getvalue(), replace(LIMITS, min_side=1)) in ("damaged", "too many pixels")
