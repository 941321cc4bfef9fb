"""`stages/convert.py --check` and options: what a conversion would do, said from a sample, and nothing written."""

import gzip
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepgen.data.conversion.look import look
from deepgen.data.conversion.raw_data import guess_form
from deepgen.data.conversion.readers.raw_sample import RawData
from deepgen.data.conversion.readers.tars import read_tar
from deepgen.errors import UserError
from tests.data.test_convert import LIMITS, picture
from tests.data.test_convert_forms import PAIRS, arrow, hf_table, put, scattered, written
from tests.data.test_convert_odd import pack, parquet, samples, stage


def check(monkeypatch, capsys, *arguments: object) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    code = stage.main()
    return code, capsys.readouterr().out.splitlines()


def names_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_check_says_the_form_and_what_is_kept_and_dropped_and_shows_three(tmp_path, monkeypatch, capsys):
    pack(tmp_path / "in" / "a.tar", [*samples(4), ("8.png", picture()), ("9.txt", b"no picture")])
    pack(tmp_path / "in" / ".ipynb_checkpoints" / "a.tar", samples(1))
    before = names_in(tmp_path)
    code, lines = check(monkeypatch, capsys, "--check", tmp_path / "in", "--min-side", 16)
    assert code == 0
    assert lines == [
        f"{tmp_path}/in: form webdataset, 1 file",
        f"passed over 1 hidden files, the first {tmp_path}/in/.ipynb_checkpoints/a.tar",
        "of 6 samples looked at, 4 would be kept (4 t2i)",
        f"  1 dropped: no caption in the sample; the first: {tmp_path}/in/a.tar, sample 8 (its files are png)",
        f"  1 dropped: target: file missing; the first: {tmp_path}/in/a.tar, sample 9",
        *(f"  kept: a.tar/{i} (t2i, 32 x 32 px): 'a cat'" for i in range(3)),
        "a conversion stops if so many are dropped everywhere; allowed: 10.0% (--max-bad-share)",
        "nothing was written",
    ]
    assert names_in(tmp_path) == before


def sources(folder: Path) -> dict[str, Path]:
    """One source of every form."""
    put(folder / "folder" / "1.png", picture())
    put(folder / "folder" / "1.txt", "a")
    put(folder / "captions" / "0.note", '{"caption": "a"}')
    note = {"image": "0.png", "annotation": "0.note"}
    edit = {"input_image": ["0.png"], "output_image": "0.png", "instruction": "a"}
    row = {"id": "a", "task": "t2i", "prompt": "p", "answer": "a", "image": picture(), "references": [], "source": "s"}
    return {
        "records": parquet(folder / "records.parquet", [row]),
        "hf": arrow(folder / "hf.arrow", hf_table(3)),
        "webdataset": pack(folder / "a.tar", scattered(3)),
        "folder": folder / "folder",
        "pairs": written(folder / "pairs" / "a.csv", PAIRS),
        "captions": written(folder / "captions" / "a.json", [note]),
        "blip3o": written(folder / "blip3o" / "a.jsonl", [{"txt": "a", "image": "0.png"}]),
        "edits": written(folder / "edits" / "a.jsonl", [edit]),
        "prompts": put(folder / "a.txt", "a cat\n"),
    }


def test_every_form_can_be_looked_at(tmp_path):
    for form, path in sources(tmp_path).items():
        assert guess_form(path) == form
        lines = list(look(RawData(path, form, task="" if form == "prompts" else "t2i"), LIMITS, 0.1))
        assert lines[0] == f"{path}: form {form}, 1 file"
        assert any(line.startswith("  kept: ") for line in lines)
        assert lines[-1] == "nothing was written"


def test_a_check_of_what_cannot_be_used_is_an_error(tmp_path, monkeypatch, capsys):
    path = put(tmp_path / "a.jsonl", json.dumps({"image": "gone.png", "text": "a"}) + "\n")
    with pytest.raises(UserError, match="not one of 1 samples looked at can be used"):
        check(monkeypatch, capsys, "--check", path)


def test_a_check_shows_no_secrets_and_takes_permissions(tmp_path, monkeypatch, capsys):
    put(tmp_path / "disk" / "0.png", picture())
    put(tmp_path / "in" / "0.png", picture())
    address = "http://user:hunter2@127.0.0.1:9/a.png?sig=hunter2"
    rows = [
        {"id": f"{address}{name}", "task": "t2i", "prompt": f"p {address}", "image": name}
        for name in ("0.png", f"{tmp_path}/disk/0.png", address)
    ]
    path = put(tmp_path / "in" / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _, lines = check(monkeypatch, capsys, "--check", path, "--min-side", 16)
    assert "of 3 samples looked at, 1 would be kept (1 t2i)" in lines
    assert "user:***@127.0.0.1:9/a.png" in str(lines) and "hunter2" not in str(lines)
    assert "lies outside of" in str(lines) and "which is no public address" in str(lines)
    _, lines = check(monkeypatch, capsys, "--check", path, "--min-side", 16, "--allow", tmp_path / "disk")
    assert "of 3 samples looked at, 2 would be kept (2 t2i)" in lines


def test_a_check_reads_no_large_source_to_its_end(tmp_path):
    put(tmp_path / "0.png", picture())
    path = put(
        tmp_path / "a.jsonl", (json.dumps({"image": "0.png", "text": "a"}) + "\n") * 200 + "not JSON\n" * 300_000
    )
    begin = time.monotonic()
    assert "of 100 samples looked at, 100 would be kept (100 t2i)" in list(look(RawData(path, "pairs"), LIMITS, 0.1))
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("members", [samples(3), scattered(3)])
def test_the_beginning_of_a_tar_shows_whole_samples_only(tmp_path, members):
    path = pack(tmp_path / "a.tar", members)
    path.write_bytes(gzip.compress(path.read_bytes()))
    for sample in read_tar(RawData(path, "webdataset"), path, until=time.monotonic() - 1):
        assert sample.image and sample.prompt


@pytest.mark.parametrize(
    ("form", "option", "value"),
    [
        ("webdataset", "--images", "."),
        ("webdataset", "--allow", "/mnt"),
        ("folder", "--images", "."),
        ("edits", "--column", "image=a"),
        ("records", "--column", "image=a"),
        ("hf", "--caption-key", "long"),
        ("records", "--task", "text"),
        ("edits", "--task", "text"),
        ("webdataset", "--column", "prompt=a"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, monkeypatch, capsys, form, option, value):
    path = sources(tmp_path)[form]
    with pytest.raises(UserError, match=rf"{option}: has no effect on form {form}; allowed with: "):
        check(monkeypatch, capsys, "--check", path, option, value)


@pytest.mark.parametrize("form", ["records", "hf", "pairs", "captions", "blip3o", "edits"])
def test_images_is_where_relative_paths_start_in_every_form_that_has_them(tmp_path, monkeypatch, capsys, form):
    put(tmp_path / "elsewhere" / "x" / "0.png", picture())
    put(tmp_path / "elsewhere" / "x" / "0.note", '{"caption": "a"}')
    image = "x/0.png"
    record = {"id": "a", "task": "edit", "prompt": "p", "answer": "a", "source": "s"}
    rows: dict[str, dict[str, Any]] = {
        "records": record | {"image": image, "references": [image]},
        "hf": {"image": image, "text": "a"},
        "pairs": {"image": image, "text": "a"},
        "captions": {"image": image, "annotation": "x/0.note"},
        "blip3o": {"image_path": image, "txt": "a"},
        "edits": {"input_image": [image], "output_image": image, "instruction": "a"},
    }
    row = rows[form]
    if form in ("records", "hf"):
        path = parquet(tmp_path / "in" / "a.parquet", [row])
    else:
        path = put(tmp_path / "in" / "a.json", json.dumps([row]))
    _, lines = check(
        monkeypatch, capsys, "--check", path, "--images", tmp_path / "elsewhere", "--min-side", 16, "--form", form
    )
    assert any("of 1 samples looked at, 1 would be kept" in line for line in lines)


@pytest.mark.parametrize("order", ["in --rows 5 out", "--rows 5 in out", "in out --rows 5"])
def test_options_may_stand_anywhere(monkeypatch, order):
    monkeypatch.setattr(sys, "argv", ["convert.py", *order.split()])
    args = stage.parse()
    assert (args.source, args.out, args.rows) == (Path("in"), Path("out"), 5)


def test_out_and_check_exclude_each_other(monkeypatch, capsys, tmp_path):
    for arguments, message in ((("--check", "a", "b"), "leave OUT out"), (("a",), "give the folder OUT, or --check")):
        with pytest.raises(UserError, match=message):
            check(monkeypatch, capsys, *arguments)
    with pytest.raises(UserError, match="--images: gone is no folder"):
        check(monkeypatch, capsys, "--check", sources(tmp_path)["hf"], "--images", "gone")


def test_splits_that_are_converted_together_are_told(tmp_path):
    for split in ("train", "test"):
        arrow(tmp_path / split / "data.arrow", hf_table(2))
        put(tmp_path / split / "dataset_info.json", "{}")
    put(tmp_path / "dataset_dict.json", "{}")
    lines = list(look(RawData(tmp_path, "hf"), LIMITS, 0.1))
    assert "its splits are converted together (test, train); for one of them give its folder" in lines
    assert os.listdir(tmp_path / "test")
