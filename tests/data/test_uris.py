"""Images by path and URI: where they are searched, and the errors if they are unreadable."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepgen.config import UserError
from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import SCHEMA, read_records, write_records
from deepgen.data.records import RecordError
from deepgen.data.uris import UriError, read_uri, version_of
from tests.data.test_records import EDIT, GOOD, PICTURE, PIXELS


class Storage(BaseHTTPRequestHandler):
    """A server for http and S3 clients, with one object at every path that does not contain "gone".

    "short": sends fewer bytes than announced. "slow": sends single bytes without end. "图": a percent-encoded name.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        asked, data = self.headers.get("Range"), PICTURE
        if "gone" in self.path or ("%" in self.path and "%E5%9B%BE%20%20" not in self.path):
            self.send_response(404)
            data = b""
        elif asked:
            first, last = asked.removeprefix("bytes=").split("-")
            data = PICTURE[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(PICTURE)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) if "slow" not in self.path else 1 << 20))
        self.end_headers()
        if not body:
            return
        if "slow" in self.path:
            self.wfile.write(data[:1])
            with contextlib.suppress(OSError):  # if the reader has gone
                while True:
                    sleep(0.01)
                    self.wfile.write(b"x")
        self.wfile.write(data[:20] if "short" in self.path else data)
        self.close_connection = "short" in self.path

    def log_message(self, *arguments: object) -> None:
        """Print nothing on the console."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def uri(scheme: str, name: str, port: int) -> str:
    if scheme == "http":
        return f"http://127.0.0.1:{port}/{name}"
    return f"s3://key:secret@bucket/{name}?scheme=http&region=us-east-1&endpoint_override=127.0.0.1%3A{port}"


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_remote_images(scheme: str, port: int) -> None:
    assert read_uri(uri(scheme, "a.png", port)) == PICTURE
    with pytest.raises(ValueError, match=r"404: Not Found|Path does not exist") as caught:
        read_uri(uri(scheme, "gone.png", port))
    assert "gone.png" in str(caught.value) and "secret" not in str(caught.value)


def test_names_in_any_alphabet(port: int) -> None:
    assert read_uri(uri("http", "图 %20.png?size=ü", port)) == PICTURE


def test_half_a_body_is_no_image(port: int) -> None:
    with pytest.raises(UriError, match=rf"short\.png: ends after 20 of {len(PICTURE)} bytes"):
        read_uri(uri("http", "short.png", port))


def test_a_server_that_drips_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgen.data.uris.HTTP_DEADLINE_S", 0.3)
    with pytest.raises(UriError, match=r"slow\.png: not read within 0\.3 s \(\d+ bytes were\)"):
        read_uri(uri("http", "slow.png", port))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("http://[x/a.png", "Invalid IPv6 URL"),
        ("file://[x", "Invalid IPv6 URL"),
        ("/a\0.png", "null byte"),
        ("file:///a%00.png", "null byte"),
        (f"http://{'a' * 64}.org/a.png", "label"),
        ("http:///a.png", "names no host"),
        ("http://127.0.0.1:x/a.png", "nonnumeric port"),
    ],
)
def test_what_is_no_uri_has_a_reason(given: str, says: str) -> None:
    with pytest.raises(UriError, match=says):
        read_uri(given)
    assert version_of(given) == (given.encode() if given.startswith("http") else None)


def test_paths_start_from_the_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a b.png").write_bytes(PICTURE)
    whole = tmp_path / "set" / "images" / "a b.png"
    edit = replace(EDIT, image="images/a b.png", references=(str(whole), f"file://{whole.parent}/a%20b.png"))
    write_records(tmp_path / "set" / "x.parquet", [replace(GOOD, image=str(whole)), edit])
    found = ParquetStore(tmp_path / "set").read(1)
    assert found == read_records(tmp_path / "set")[1]
    assert found.image == str(whole)
    assert all((decode_image(data) == PIXELS).all() for data in (found.image, *found.references))
    assert TrainingSet(ParquetStore(tmp_path / "set"), 64).sample(1).target is not None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("gone.png", r"gone\.png: No such file or directory"),
        ("folder", "folder: Is a directory"),
        ("ftp://host/a.png", "unknown scheme ftp://; allowed: a path, file://, s3://"),
        ("note.png", "cannot identify image file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, given: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "note.png").write_text("no picture")
    write_records(tmp_path / "x.parquet", [replace(GOOD, image=given)])
    with pytest.raises(RecordError, match=says) as caught:
        TrainingSet(ParquetStore(tmp_path), 64).sample(0)
    assert str(caught.value).startswith(f"{tmp_path / 'x.parquet'}, row 1: image is not a readable image")
    assert caught.value.id == "a"


def test_other_types_of_the_columns(tmp_path: Path) -> None:
    """Large, view and dictionary types are read. Other types, and bytes mixed with paths, raise errors."""
    table = pa.Table.from_pylist([vars(GOOD) | {"references": []}], schema=SCHEMA)
    number = SCHEMA.get_field_index("image")
    pq.write_table(table.set_column(number, "image", pa.array([PICTURE], pa.large_binary())), tmp_path / "a.parquet")
    assert ParquetStore(tmp_path / "a.parquet").read(0) == GOOD
    paths = pa.array(["/a.png"])
    for path in (paths.dictionary_encode(), paths.cast(pa.string_view())):
        pq.write_table(table.set_column(number, "image", path), tmp_path / "b.parquet")
        assert ParquetStore(tmp_path / "b.parquet").read(0).image == "/a.png"
    pq.write_table(table.set_column(number, "image", pa.array([7])), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: column image is int64, which does not fit; allowed: binary or"):
        ParquetStore(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="image holds 1 paths among 2 images; allowed: all bytes, or none"):
        write_records(tmp_path / "d.parquet", [GOOD, replace(GOOD, id="b", image="a.png")])
