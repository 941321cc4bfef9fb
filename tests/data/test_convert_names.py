"""What a data set names: paths and URIs mean the same in all forms, and lead nowhere else."""

import base64
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepgen.config import UserError
from deepgen.data.conversion.raw_data import guess_form
from deepgen.data.conversion.readers.source_files import find_files
from stages.convert import allowed
from tests.data.test_convert import convert, picture, reasons
from tests.data.test_convert_forms import arrow, lines, put
from tests.data.test_convert_odd import pack
from tests.helpers.servers import redirect, reply, server

ALLOW = ("127.0.0.1",)


def write(folder, form, images):
    """A data set of a form whose images are given by these names. Returns what to convert, and its options."""
    folder.mkdir(exist_ok=True)
    if form in ("pairs.jsonl", "pairs.csv", "records.jsonl", "prompts.jsonl"):
        return write_table(folder / f"x.{form.partition('.')[2]}", form, images)
    if form in ("hf", "struct", "records", "arrow"):
        own = {"task": "t2i", "answer": "a", "references": [], "source": "s"} if form == "records" else {}
        rows = [
            {"id": str(i), "prompt": "p", "image": {"bytes": None, "path": name} if form == "struct" else name} | own
            for i, name in enumerate(images)
        ]
        table = pa.Table.from_pylist(rows)
        if form == "arrow":
            return arrow(folder / "x.arrow", table)
        pq.write_table(table, folder / "x.parquet")
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


def write_table(path, form, images):
    if form == "pairs.csv":
        return put(path, "file_name,text\n" + "".join(f"{name},p\n" for name in images))
    row = {
        "pairs.jsonl": lambda name: {"file_name": name, "text": "p"},
        "records.jsonl": lambda name: {"task": "t2i", "prompt": "p", "image": name},
        "prompts.jsonl": lambda name: {"prompt": "p", "references": [name]},
    }[form]

    def own(number):
        return {"id": str(number)} if form == "records.jsonl" else {}

    return put(path, lines([row(name) | own(i) for i, name in enumerate(images)]))


TABLES = ["pairs.jsonl", "pairs.csv", "records.jsonl", "prompts.jsonl"]
FORMS = ["records", "hf", "struct", "arrow", "captions", "blip3o", "edits", *TABLES]


def options(form, **more):
    """Prompts have the task that their columns tell."""
    return more | ({"task": ""} if form == "prompts.jsonl" else {})


def written(out):
    """All bytes below a folder."""
    return b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())


@pytest.mark.parametrize("form", FORMS)
def test_paths_and_uris_are_read_in_all_forms(tmp_path, form):
    data = tmp_path / "in"
    data.mkdir()
    (data / "a b.png").write_bytes(picture())
    with server({"/a.png": reply(picture())}) as port:
        names = ["a b.png", str(data / "a b.png"), f"file://{data}/a%20b.png", f"http://u:p@127.0.0.1:{port}/a.png"]
        found = convert(write(data, form, names), tmp_path / "out", **options(form, allow=ALLOW))
    assert [record.image for record in found] == [None if form == "prompts.jsonl" else picture()] * 4
    if form in ("edits", "prompts.jsonl"):
        assert [record.references for record in found] == [(picture(),)] * 4


@pytest.mark.parametrize("form", FORMS)
def test_names_stay_under_the_folder_of_the_data(tmp_path, form):
    (tmp_path / "private.png").write_bytes(picture())
    data = tmp_path / "in"
    data.mkdir()
    (data / "link.png").symlink_to(tmp_path / "private.png")
    names = ["../private.png", str(tmp_path / "private.png"), f"file://{tmp_path}/private.png", "link.png"]
    source = write(data, form, names)
    assert convert(source, tmp_path / "out", **options(form)) == []
    found = reasons(tmp_path / "out")
    assert len(found) == 4 and all(f"lies outside of {data}" in reason for reason in found)
    assert len(convert(source, tmp_path / "out2", **options(form, allow=(str(tmp_path),)))) == 4


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
    why = f"caption: cannot be read (lies outside of {data} or {images}; allowed: files in there, or"
    assert [reason.startswith(why) for reason in reasons(tmp_path / "out")] == [True, True]
    assert b"a secret" not in written(tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_private_addresses_are_not_asked_and_secrets_not_written(tmp_path, form):
    heads: list[str] = []
    with server({"/": reply(picture())}, heads) as port:
        names = [f"http://u:hunter2@127.0.0.1:{port}/a.png?sig=hunter2", f"http://2130706433:{port}/?token=hunter2"]
        assert convert(write(tmp_path / "in", form, names), tmp_path / "out", **options(form)) == []
    assert not heads and len(reasons(tmp_path / "out")) == 2
    assert all("no public address" in reason for reason in reasons(tmp_path / "out"))
    assert b"127.0.0.1" in written(tmp_path / "out") and b"hunter2" not in written(tmp_path / "out")
    with server({"/": redirect("http://127.0.0.2/?sig=hunter2")}) as port:
        names = [f"http://127.0.0.1:{port}/a.png"]
        assert convert(write(tmp_path / "in2", form, names), tmp_path / "out2", **options(form, allow=ALLOW)) == []
    assert "leads to ..., which is no public address" in reasons(tmp_path / "out2")[0]


@pytest.mark.parametrize("form", FORMS)
def test_base64_needs_no_permission_and_what_is_missing_is_said_alike(tmp_path, form):
    names = [f"data:image/png;base64,{base64.b64encode(picture()).decode()}", base64.b64encode(picture()).decode()]
    if form == "pairs.csv":
        names[0] = f'"{names[0]}"'  # it has a comma
    names += ["gone.png", f"file://{tmp_path}/in/gone.png"]
    found = convert(write(tmp_path / "in", form, names), tmp_path / "out", **options(form))
    images = [record.references[0] if form == "prompts.jsonl" else record.image for record in found]
    assert images == [picture()] * 2
    assert [reason.partition(": ")[2] for reason in reasons(tmp_path / "out")] == ["file missing"] * 2


def test_a_folder_of_pictures_holds_nothing_from_elsewhere(tmp_path):
    """Neither a picture nor a caption may be a link out of it. A pipe is no caption, and no picture."""
    data = tmp_path / "in"
    put(tmp_path / "private.png", picture())
    put(tmp_path / "private.txt", "hunter2")
    for name in ("0.png", "1.png", "4.png"):
        put(data / name, picture(value=3))
    for name in ("0.txt", "2.txt", "3.txt"):
        put(data / name, "p")
    (data / "1.txt").symlink_to(tmp_path / "private.txt")
    (data / "2.png").symlink_to("../private.png")
    os.mkfifo(data / "3.png")
    os.mkfifo(data / "4.txt")
    assert [record.id for record in convert(data, tmp_path / "out", form="folder")] == ["0.png"]
    link = f"cannot be read (lies outside of {data} (it is ...); allowed: files in there"
    assert [reason.partition(", or in a folder")[0] for reason in reasons(tmp_path / "out")] == [
        f"caption: {link}",
        f"target: {link}",
        "target: cannot be read (is a FIFO; allowed: a regular file)",
        "no caption beside the picture: 4.txt or 4.caption or 4.json",
    ]
    assert b"hunter2" not in written(tmp_path / "out") and picture() not in written(tmp_path / "out")
    assert len(convert(data, tmp_path / "out2", form="folder", allow=(str(tmp_path),))) == 3


def test_members_of_a_tar_that_are_links_are_no_pictures(tmp_path):
    put(tmp_path / "private.png", picture())
    path = pack(tmp_path / "in" / "a.tar", [("0.txt", b"p"), ("1.txt", b"p"), ("1.png", picture())])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "private.png")
        tar.addfile(link)
        link.name, link.type = "../../2.png", tarfile.LNKTYPE
        tar.addfile(link)
    assert [record.id for record in convert(path, tmp_path / "out")] == ["a.tar/1"]
    assert reasons(tmp_path / "out") == ["target: file missing"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "captions"])
def test_what_lies_behind_a_linked_folder_belongs_to_the_files_in_it(tmp_path, form):
    """Files are searched through links. Names lead out through a link only from files that lie behind it themselves."""
    data, disk = tmp_path / "in", tmp_path / "disk"
    put(disk / "deep" / "a.png", picture())
    put(tmp_path / "private" / "b.png", picture())
    data.mkdir()
    (data / "link").symlink_to(disk)
    (data / "evil").symlink_to(tmp_path / "private")
    names = [str(data / "link" / "deep" / "a.png"), str(disk / "deep" / "a.png")]
    write(disk / "deep", form, [*names, str(tmp_path / "private" / "b.png"), str(data / "evil" / "b.png")])
    assert len(convert(data, tmp_path / "out", **options(form))) == 2
    assert ["lies outside of" in reason for reason in reasons(tmp_path / "out")] == [True, True]
    assert find_files(data).notes()[-1].startswith(f"follows 2 links out of the folder, the first {data}/evil")
    own = write(data, form, names)
    assert convert(own, tmp_path / "out2", **options(form)) == []


def test_pictures_and_captions_behind_a_linked_folder_are_read(tmp_path):
    put(tmp_path / "disk" / "deep" / "a.png", picture())
    put(tmp_path / "disk" / "deep" / "a.txt", "p")
    (tmp_path / "disk" / "deep" / "b.png").symlink_to("a.png")
    put(tmp_path / "disk" / "deep" / "b.txt", "p")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk" / "deep")
    assert [record.id for record in convert(tmp_path / "in", tmp_path / "out")] == ["link/a.png", "link/b.png"]


def test_ids_of_the_data_cannot_carry_secrets_or_length_into_the_quarantine(tmp_path):
    rows = [{"id": f"https://u:hunter2@h/?sig=hunter2{'x' * 5_000}", "task": "t2i", "prompt": "p", "image": "gone.png"}]
    assert convert(put(tmp_path / "in" / "a.jsonl", lines(rows)), tmp_path / "out") == []
    assert b"https://u:***@h/" in written(tmp_path / "out") and b"hunter2" not in written(tmp_path / "out")
    rows = [{"id": "ab" * 5_000, "task": "t2i", "prompt": "p", "image": "gone.png"}]
    assert convert(put(tmp_path / "in2" / "a.jsonl", lines(rows)), tmp_path / "out2") == []
    assert b"... (10,000 letters)" in written(tmp_path / "out2") and b"ab" * 600 not in written(tmp_path / "out2")


def test_a_table_without_a_header_tells_its_first_row_cut_and_without_secrets(tmp_path):
    path = put(tmp_path / "a.csv", f"https://u:hunter2@h/a.png,{'x' * 5_000}\nb.png,p\n")
    for ask in (lambda: guess_form(path), lambda: convert(path, tmp_path / "out", form="pairs")):
        with pytest.raises(UserError) as caught:
            ask()
        assert "https://u:***@h/a.png" in str(caught.value) and len(str(caught.value)) < 1_000


def test_permissions_of_the_command_line_are_checked():
    assert allowed(["/mnt", "10.0.0.0/8"]) == ("/mnt", "10.0.0.0/8")
    with pytest.raises(UserError, match="--allow: got 'http://x'; allowed: absolute folders"):
        allowed(["http://x"])


def test_paths_with_windows_separators_at_home_and_beside_the_list(tmp_path, monkeypatch):
    put(tmp_path / "in" / "train" / "sub" / "0.png", picture())
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    names = ["sub\\\\0.png", "train\\\\sub\\\\0.png", "~/train/sub/0.png", "sub/0.png", "gone\\\\0.png"]
    path = put(tmp_path / "in" / "train" / "list.jsonl", "".join(f'{{"image": "{n}", "text": "a"}}\n' for n in names))
    assert [r.id for r in convert(tmp_path / "in", tmp_path / "out")] == [f"train/list-{i}" for i in (1, 2, 3, 4)]
    assert reasons(tmp_path / "out") == ["target: file missing"]
    put(tmp_path / "in" / "sub" / "0.png", picture(value=7))  # SOURCE's folder comes first
    found = convert(tmp_path / "in", tmp_path / "out2")
    assert found[3].image == picture(value=7) and path.is_file()
