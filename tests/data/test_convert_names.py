"""What a data set names: paths and URIs mean the same in all forms, and lead nowhere else."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepgen.config import UserError
from stages.convert import allowed
from tests.data.test_convert import convert, picture, reasons
from tests.helpers.servers import redirect, reply, server

ALLOW = ("127.0.0.1",)


def write(folder, form, images):
    """A data set of a form whose images are given by these names. Returns what to convert, and its options."""
    folder.mkdir(exist_ok=True)
    if form in ("hf", "struct", "records"):
        own = {"task": "t2i", "answer": "a", "references": [], "source": "s"} if form == "records" else {}
        rows = [
            {"id": str(i), "prompt": "p", "image": {"bytes": None, "path": name} if form == "struct" else name} | own
            for i, name in enumerate(images)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
        return folder / "x.parquet"
    if form == "captions":
        (folder / "c.json").write_text('{"caption": "p"}')
    entry = {
        "captions": lambda name: {"image": name, "annotation": "c.json"},
        "blip3o": lambda name: {"txt": "p", "image": name},
        "edits": lambda name: {"instruction": "p", "input_image": [name], "output_image": name},
    }[form]
    (folder / "list.json").write_text(json.dumps([entry(name) for name in images]))
    return folder / "list.json"


FORMS = ["records", "hf", "struct", "captions", "blip3o", "edits"]


@pytest.mark.parametrize("form", FORMS)
def test_paths_and_uris_are_read_in_all_forms(tmp_path, form):
    data = tmp_path / "in"
    data.mkdir()
    (data / "a b.png").write_bytes(picture())
    with server({"/a.png": reply(picture())}) as port:
        names = ["a b.png", str(data / "a b.png"), f"file://{data}/a%20b.png", f"http://u:p@127.0.0.1:{port}/a.png"]
        found = convert(write(data, form, names), tmp_path / "out", allow=ALLOW)
    assert [record.image for record in found] == [picture()] * 4
    if form == "edits":
        assert [record.references for record in found] == [(picture(),)] * 4


@pytest.mark.parametrize("form", FORMS)
def test_names_stay_under_the_folder_of_the_data(tmp_path, form):
    (tmp_path / "private.png").write_bytes(picture())
    data = tmp_path / "in"
    data.mkdir()
    (data / "link.png").symlink_to(tmp_path / "private.png")
    names = ["../private.png", str(tmp_path / "private.png"), f"file://{tmp_path}/private.png", "link.png"]
    source = write(data, form, names)
    assert convert(source, tmp_path / "out") == []
    found = reasons(tmp_path / "out")
    assert len(found) == 4 and all(f"lies outside of {data}" in reason for reason in found)
    assert len(convert(source, tmp_path / "out2", allow=(str(tmp_path),))) == 4


def test_images_and_annotations_of_a_caption_list(tmp_path):
    """--images names a folder that the data may use, too; an annotation elsewhere is no caption."""
    data, images = tmp_path / "in", tmp_path / "images"
    for folder in (data, images):
        folder.mkdir()
    (tmp_path / "private.json").write_text('{"caption": "a secret"}')
    (images / "a.png").write_bytes(picture())
    (images / "a.json").write_text('{"caption": "a cat"}')
    entries = [{"image": "a.png", "annotation": name} for name in ("../private.json", "/etc/passwd", "a.json")]
    (data / "list.json").write_text(json.dumps(entries))
    found = convert(data / "list.json", tmp_path / "out", images=images)
    assert [record.prompt for record in found] == ["a cat"]
    assert reasons(tmp_path / "out") == ["empty caption"] * 2
    assert "a secret" not in "".join(
        file.read_text("latin-1") for file in (tmp_path / "out").rglob("*") if file.is_file()
    )


@pytest.mark.parametrize("form", FORMS)
def test_private_addresses_are_not_asked_and_secrets_not_written(tmp_path, form):
    heads: list[str] = []
    with server({"/": reply(picture())}, heads) as port:
        names = [f"http://u:hunter2@127.0.0.1:{port}/a.png?sig=hunter2", f"http://2130706433:{port}/?token=hunter2"]
        assert convert(write(tmp_path / "in", form, names), tmp_path / "out") == []
    assert not heads and len(reasons(tmp_path / "out")) == 2
    assert all("no public address" in reason for reason in reasons(tmp_path / "out"))
    written = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert written and not any(b"hunter2" in data for data in written)
    with server({"/": redirect("http://127.0.0.2/?sig=hunter2")}) as port:
        names = [f"http://127.0.0.1:{port}/a.png"]
        assert convert(write(tmp_path / "in2", form, names), tmp_path / "out2", allow=ALLOW) == []
    assert "leads to ..., which is no public address" in reasons(tmp_path / "out2")[0]


def test_permissions_of_the_command_line_are_checked():
    assert allowed(["/mnt", "10.0.0.0/8"]) == ("/mnt", "10.0.0.0/8")
    with pytest.raises(UserError, match="--allow: got 'http://x'; allowed: absolute folders"):
        allowed(["http://x"])
