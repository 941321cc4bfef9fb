"""Records: reading and writing files; every error names file and row."""

from __future__ import annotations

import gzip
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.config import UserError
from deepgen.data.images import decode_image, header_size
from deepgen.data.loading.buckets import fixed_area_size
from deepgen.data.loading.dataset import TrainingSet, image_to_tensor
from deepgen.data.loading.parquet_store import ListStore, ParquetStore
from deepgen.data.parquet import read_records, read_rows, write_records
from deepgen.data.records import Record, RecordError


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
PICTURE = encoded(PIXELS)
GOOD = Record("a", "t2i", "a cat", "a cat", PICTURE, (), "test")
EDIT = Record("b", "edit", "mirror it", "a cat, mirrored", PICTURE, (PICTURE, PICTURE), "test")
PROMPT = Record("c", "text", 'the word "HI"', "HI", None, (), "test")


def test_records_survive_a_file_and_a_folder(tmp_path: Path) -> None:
    write_records(tmp_path / "one" / "x.parquet", [GOOD, EDIT])
    write_records(tmp_path / "one" / "y.parquet", [PROMPT])
    assert read_records(tmp_path / "one" / "x.parquet") == [GOOD, EDIT]
    assert read_records(tmp_path / "one") == [GOOD, EDIT, PROMPT]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (replace(GOOD, task="video"), "task 'video'; allowed: t2i, reasoning, text, edit"),
        (replace(GOOD, prompt="  "), "prompt is empty"),
        (replace(GOOD, references=(PICTURE,)), "task t2i with 1 reference images"),
        (replace(EDIT, references=()), "task edit with 0 reference images"),
        (replace(GOOD, image=b""), "an image of no bytes"),
        (EDIT, "id 'b' was already used in"),
        (replace(GOOD, answer=None), "answer is null"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Record, says: str) -> None:
    write_records(tmp_path / "x.parquet", [EDIT, bad])
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / "x.parquet")
    assert "x.parquet, row 2: " in str(caught.value) and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_records(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "prompt": ["x"]}), tmp_path / "columns.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    write_records(tmp_path / "empty.parquet", [])
    for name, says in [
        ("columns.parquet", "missing column task"),
        ("text.parquet", "can't be read as parquet"),
        ("empty.parquet", "holds no records"),
        ("absent.parquet", "no such file"),
    ]:
        with pytest.raises(UserError, match=says):
            read_records(tmp_path / name)


def test_prompt_lists(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    lines = [
        ("t2i", "a cat"),
        ("text", 'the word "HI"'),
        ("text", "牌子上写着「你好」"),
        ("t2i", 'a 19" rack and a 24" TV'),
    ]
    file.write_text("".join(f"{prompt}\n" for _, prompt in lines), encoding="utf-8")
    assert [(r.task, r.prompt, r.image) for r in read_records(file)] == [(*line, None) for line in lines]
    file.write_text("a cat\n\na dog\n")
    with pytest.raises(UserError, match=r"prompts\.txt, row 2: empty line"):
        read_records(file)


def test_lines_end_where_they_end_and_the_text_is_utf_8(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\na dog\u2028beside a cat\x0c\r\n".encode())
    assert [record.prompt for record in read_records(file)] == ["a cat", "a dog\u2028beside a cat"]
    file.write_bytes(b"a cat\na caf\xe9\n")
    with pytest.raises(UserError, match=r"prompts\.txt, row 2: not UTF-8 text .*; allowed: a file saved as UTF-8"):
        read_records(file)


def test_decode_puts_transparency_on_white() -> None:
    assert np.array_equal(decode_image(PICTURE), PIXELS)
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    pixels = decode_image(encoded(clear))
    assert pixels[0, 0].tolist() == [10, 20, 30] and pixels[1, 1].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(PICTURE[:40])


def test_a_damaged_avif_is_no_readable_image() -> None:
    """AVIF's decoder is the only one that raises RuntimeError."""
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    whole = encoded(noise, "AVIF")
    start = whole.index(b"mdat") + 4
    data = whole[:start] + bytes(len(whole) - start)  # the headers, and no frame
    assert header_size(data) == (100, 100)
    with pytest.raises(ValueError, match=r"not a readable image \(Failed to decode frame 0"):
        decode_image(data)


GREYS = np.array([[0, 256, 257 * 100, 0x7FFF, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greys_keep_their_range(kind: str) -> None:
    assert decode_image(encoded(GREYS, kind))[0, :, 0].tolist() == [0, 1, 100, 127, 255]


def test_16_bit_greys_have_one_that_is_transparent() -> None:
    stream = io.BytesIO()
    Image.fromarray(GREYS).save(stream, "PNG", transparency=256)
    assert decode_image(stream.getvalue())[0, :, 0].tolist() == [0, 255, 100, 127, 255]


@pytest.mark.parametrize("given", ["int32", "float32", "white as 0"])
def test_greys_without_a_known_white_are_refused(given: str) -> None:
    stream = io.BytesIO()
    if given == "white as 0":
        Image.fromarray(GREYS).save(stream, "TIFF", tiffinfo={262: 0})
    else:
        Image.fromarray(GREYS.astype(given)).save(stream, "TIFF")
    with pytest.raises(ValueError, match=r"(white is not known|with white as 0); allowed: 8 bits, or unsigned 16"):
        decode_image(stream.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    upright = np.zeros((32, 64, 3), dtype=np.uint8)
    upright[:16, :16], upright[:16, 48:], upright[16:, :16] = 250, 170, 90
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    rows = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]]
    stored = [*rows, *(rows[i].swapaxes(0, 1) for i in range(4))]
    Image.fromarray(stored[orientation - 1]).save(stream, kind, exif=exif, quality=95)
    data = stream.getvalue()
    assert np.abs(decode_image(data).astype(int) - upright).max() < 30
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    assert header_size(data) == (64, 32)


def test_damaged_exif_does_not_lose_the_picture() -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", exif=b"Exif\0\0II*\0\xff\xff")
    assert np.array_equal(decode_image(stream.getvalue()), PIXELS) and header_size(stream.getvalue()) == (5, 4)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1080, 1920, (384, 704)),
        (599, 600, (512, 544)),
        (100, 1000, (192, 1632)),
        (512, 512, (512, 512)),
        (600, 600, (512, 512)),
        (1260, 2240, (416, 704)),  # exactly 384, but rounding makes it a little more, in the reference too
    ],
)
def test_sizes_are_those_of_the_method(height: int, width: int, expected: tuple[int, int]) -> None:
    assert fixed_area_size(height, width, 512) == expected  # method 1.9


def test_sizes_are_the_references() -> None:
    """Where the exact side is a multiple of 32, rounding decides. Elsewhere it is too small to matter."""

    def reference(height: int, width: int) -> tuple[int, int]:
        ratio = 512 / ((height * width) ** 0.5)
        return math.ceil(height * ratio / 32) * 32, math.ceil(width * ratio / 32) * 32

    exact = [(k * a**2, k * b**2) for a in range(1, 33) for b in range(1, 33) for k in (1, 7, 31, 140)]
    others = np.random.default_rng(0).integers(81, 6000, (5000, 2)).tolist()
    for height, width in [*exact, *others]:
        assert fixed_area_size(height, width, 512) == reference(height, width), (height, width)


def test_tensors_span_minus_one_to_one() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    tensor = image_to_tensor(pixels, 64)
    assert tensor.shape == (3, 64, 64) and tensor.min() == -1 and tensor.max() == 1
    assert image_to_tensor(PIXELS, 64).shape == (3, 64, 96)


def test_training_set_names_the_record_it_cannot_use() -> None:
    data = TrainingSet(ListStore([GOOD, EDIT, replace(GOOD, id="d", image=PICTURE[:40]), PROMPT]), 64)
    assert len(data.sample(1).references) == 2 and data.sample(0).references == []
    with pytest.raises(RecordError, match=r"row 3: image is not a readable image"):
        data.sample(2)
    with pytest.raises(RecordError, match="row 4: no target image"):
        data.sample(3)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".csv", ".tsv", ".TXT"])
def test_prompt_lists_of_every_kind(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": "a cat"}, {"prompt": 'a "HI"', "task": "reasoning", "answer": "hi", "id": "x", "tag": "two"}]
    file = tmp_path / f"prompts{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == ".json":
        text = json.dumps(rows)
    elif suffix in (".csv", ".tsv"):
        comma = "," if suffix == ".csv" else "\t"
        text = comma.join(["prompt", "task", "answer", "id"]) + "\n" + f"a cat{comma * 3}\n"
        text += comma.join(['"a ""HI"""', "reasoning", "hi", "x"]) + "\n"
    elif suffix == ".TXT":
        text = "a cat\na dog\n"
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    found = read_records(file)
    assert found[0] == Record("prompts-1", "t2i", "a cat", "a cat", None, (), file.name)
    if suffix != ".TXT":
        assert found[1] == Record("x", "reasoning", 'a "HI"', "hi", None, (), file.name)


def test_lists_of_edits_and_of_plain_prompts(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    edit = {"input_image": ["a.png"], "output_image": "b.png", "instruction": "make it blue"}
    file.write_text(json.dumps(edit) + "\n" + json.dumps("a cat") + "\n")
    found = read_records(file)
    assert [(r.task, r.prompt, r.references) for r in found] == [
        ("edit", "make it blue", (str(tmp_path / "a.png"),)),
        ("t2i", "a cat", ()),
    ]


def test_a_row_of_a_prompt_list_that_cannot_be_used_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat"}\n{"promt": "b"}\n{"prompt": "c", "task": "draw"}\n{"prompt"\n{"prompt": 5}\n')
    reasons = [row.record.reason for row in read_rows(file) if isinstance(row.record, RecordError)]
    assert reasons == [
        "prompt is empty",
        "task 'draw'; allowed: t2i, reasoning, text, edit",
        "not JSON",
        "prompt is int; allowed: text",
    ]


def test_data_in_another_form_is_told_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "a.tar"):
        for read in (read_rows, ParquetStore):
            with pytest.raises(UserError, match=rf"python stages/convert.py {path} OUT"):
                read(path)


def test_hidden_files_in_a_folder_of_parquet_are_no_data(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", [GOOD])
    (tmp_path / "._a.parquet").write_bytes(b"from a Mac")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert read_records(tmp_path) == [GOOD]
    assert len(ParquetStore(tmp_path).tasks) == 1
