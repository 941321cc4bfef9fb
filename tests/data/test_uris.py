"""Images by path and URI: where they are searched, and the errors if they are unreadable."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepgen.config import UserError
from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import SCHEMA, read_records, write_records
from deepgen.data.records import RecordError
from deepgen.data.uris import DataUri, UriError, absolute, reach_of, read_uri, version_of
from deepgen.reading.reach import Reach
from tests.data.test_records import EDIT, GOOD, PICTURE, PIXELS
from tests.helpers.servers import endless
from tests.helpers.servers import server as drip


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


LOCAL = Reach.of((), ["127.0.0.0/8"])


def uri(scheme: str, name: str, port: int) -> DataUri:
    if scheme == "http":
        return DataUri(f"http://127.0.0.1:{port}/{name}", LOCAL)
    options = f"scheme=http&region=us-east-1&endpoint_override=127.0.0.1%3A{port}"
    return DataUri(f"s3://key:secret@bucket/{name}?{options}", LOCAL)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_remote_images(scheme: str, port: int) -> None:
    assert read_uri(uri(scheme, "a.png", port)) == PICTURE
    with pytest.raises(ValueError, match=r"404: Not Found|Path does not exist") as caught:
        read_uri(uri(scheme, "gone.png", port))
    assert "gone.png" in str(caught.value) and "secret" not in str(caught.value)


def test_names_in_any_alphabet(port: int) -> None:
    assert read_uri(uri("http", "图 %20.png?size=ü", port)) == PICTURE


@pytest.mark.parametrize(
    "name", ["a b.png", "a#1.png", "a?b.png", "图片/猫.png", "100%.png", "50%25.png", "a+b&c=d.png"]
)
def test_keys_of_buckets_are_written_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Asked(Storage):
        def _answer(self, body: bool) -> None:
            asked.append(unquote(self.path.partition("?")[0]))
            self.path = "/fine"
            super()._answer(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read_uri(uri("s3", name, server.server_port)) == PICTURE
        assert read_uri(uri("s3", quote(name), server.server_port)) == PICTURE
        server.shutdown()
    decoded = name.replace("%25", "%")
    assert set(asked) == {f"/bucket/{decoded}", f"/bucket/{name}"}


@pytest.mark.parametrize("secret", ["plain", "a/b+c=", "a%2Fb%2Bc%3D"])
def test_a_secret_of_a_bucket_is_used_as_it_is(secret: str) -> None:
    signed: list[str] = []

    class Asked(Storage):
        def _answer(self, body: bool) -> None:
            signed.append(self.headers["Authorization"])
            self.path = "/fine" if unquote(self.path) == "/bucket/a@b:c.png" else "/gone"
            super()._answer(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = f"scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{server.server_port}"
        assert read_uri(DataUri(f"s3://AKID:{secret}@bucket/a@b:c.png?{options}", LOCAL)) == PICTURE
        server.shutdown()
    assert all("Credential=AKID/" in one for one in signed)


def test_a_key_that_looks_encoded_and_is_not(tmp_path: Path) -> None:
    """Of two readings of a name the decoded one is tried first, as in every URI, then the name as it is."""
    tried: list[str] = []

    class OnlyLiteral(Storage):
        def _answer(self, body: bool) -> None:
            tried.append(self.path)
            self.path = "/fine" if "%2520" in self.path else "/gone"
            super()._answer(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), OnlyLiteral) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read_uri(uri("s3", "a%20b.png", server.server_port)) == PICTURE
        server.shutdown()
    assert "/bucket/a%20b.png" in tried[0]
    (tmp_path / "a%20b#c.png").write_bytes(PICTURE)
    assert read_uri(DataUri(f"file://{tmp_path}/a%20b#c.png", reach_of(tmp_path))) == PICTURE


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            "s3://bucket/a.png?scheme=http&endpoint_override=127.0.0.1:9",
            "has the endpoint '127.0.0.1'; allowed: .*allow",
        ),
        ("s3://bucket/a.png?endpoint_override=http://169.254.169.254", "has the endpoint '169.254.169.254'"),
        ("gs://bucket/a.png?endpoint_override=localhost:9&scheme=http", "has the endpoint 'localhost'"),
        ("s3://bucket/a.png?endpoint_override=evil.test%5C@127.0.0.1", "has the endpoint "),
        ("s3://bucket/a.png?endpoint_override=127.0.0.1:9%23@evil.test", "has the endpoint "),
        ("s3://bucket/a.png?region=evil.test/&scheme=http", "region 'evil.test/'; allowed: letters"),
        ("s3://bucket/a.png?scheme=file", "scheme file; allowed: http and https"),
        ("s3://169.254.169.254:80/a.png", "names no bucket; allowed: s3://BUCKET/KEY"),
        ("s3://bucket", "names no key; allowed: s3://BUCKET/KEY"),
        ("gs:///a.png", "names no bucket; allowed: gs://BUCKET/KEY"),
    ],
)
def test_an_address_of_a_bucket_leads_to_no_other_server(given: str, says: str) -> None:
    with pytest.raises(UriError, match=says):
        read_uri(DataUri(given, Reach() if "evil" not in given else LOCAL))


def test_a_bucket_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgen.data.uris.DEADLINE_S", 0.5)
    drips = endless(b"HTTP/1.1 200 OK\r\nX-A: ", b"a")
    with drip({"/": drips}) as port, pytest.raises(UriError, match=r"slow\.png.*: not read within 0\.5 s"):
        read_uri(uri("s3", "slow.png", port))


# ---- Files ----


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(tmp_path / "s.png"))
        for name, says in [
            ("fifo", "is a FIFO; allowed: a regular file"),
            ("folder", "Is a directory"),
            ("s", "a socket"),
        ]:
            named = DataUri(str(tmp_path / f"{name}.png"), reach_of(tmp_path))
            with pytest.raises(UriError, match=says):
                read_uri(named)
            assert version_of(named) is None
    for device in ("/dev/zero", "/dev/stdin", "/dev/full"):
        with pytest.raises(UriError, match=r"device|FIFO|Is a directory|outside"):
            read_uri(DataUri(device, Reach.of([Path("/dev")])))


def test_a_picture_in_base64_is_a_long_name(tmp_path: Path) -> None:
    begun = monotonic()
    with pytest.raises(UriError, match="File name too long") as caught:
        read_uri(absolute("iVBOR+/=" * 1_000_000, tmp_path))
    assert monotonic() - begun < 30 and len(str(caught.value)) < 1000


def test_files_have_the_limit_of_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgen.data.uris.MAX_BYTES", 1000)
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UriError, match="more than 1,000 bytes"):
        read_uri(DataUri(str(tmp_path / "a.png"), reach_of(tmp_path)))


def test_names_stay_in_the_folder_of_their_data(tmp_path: Path) -> None:
    data, secret = tmp_path / "set", tmp_path / "private.png"
    (data / "images").mkdir(parents=True)
    secret.write_bytes(PICTURE)
    (data / "link.png").symlink_to(secret)
    (data / "out").symlink_to(tmp_path)
    (tmp_path / "set-2").mkdir()
    (tmp_path / "set-2" / "a.png").write_bytes(PICTURE)
    (data / "images" / "a.png").write_bytes(PICTURE)
    (data / "inner.png").symlink_to(data / "images" / "a.png")
    write_records(data / "x.parquet", [GOOD])
    outside = [
        "../private.png",
        str(secret),
        f"file://{secret}",
        f"file://localhost{secret}",
        "link.png",
        "out/private.png",
    ]
    outside += ["images/../../private.png", f"{data}-2/a.png", "/etc/passwd", f"file://{data}/%2e%2e/private.png"]
    for name in outside:
        image = DataUri(*_in(data, name, ()))
        with pytest.raises(
            UriError, match=f"lies outside of {data}.*; allowed: files in there, or in a folder of data"
        ):
            read_uri(image)
        assert version_of(image) is None
        if "private" in name or "link" in name:
            assert read_uri(DataUri(*_in(data, name, (str(tmp_path),)))) == PICTURE
    for name in ("images/a.png", "inner.png", "images/../images/a.png", f"{data}/images/a.png"):
        assert read_uri(DataUri(*_in(data, name, ()))) == PICTURE


def _in(data: Path, name: str, allow: tuple[str, ...]) -> tuple[str, Reach]:
    """The name as records of a parquet file in the folder have it."""
    image = replace(GOOD, image=name)
    write_records(data / "x.parquet", [image])
    (found,) = read_records(data / "x.parquet", allow)
    assert isinstance(found.image, DataUri) and ParquetStore(data, allow=allow).read(0) == found
    return str(found.image), found.image.reach


def test_a_download_from_hugging_face_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "datasets--me--cats" / "snapshots" / "0123abc",
        tmp_path / "datasets--me--cats" / "blobs",
    )
    for folder in (snapshot / "data", blobs):
        folder.mkdir(parents=True)
    (blobs / "1").write_bytes(PICTURE)
    (snapshot / "data" / "1.png").symlink_to("../../../blobs/1")
    (tmp_path / "datasets--me--cats" / "other.png").write_bytes(PICTURE)
    assert read_uri(DataUri(*_in(snapshot / "data", "1.png", ()))) == PICTURE
    with pytest.raises(UriError, match="lies outside of"):
        read_uri(DataUri(*_in(snapshot / "data", "../../../other.png", ())))


def test_a_plain_text_is_no_permission_to_read_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    with pytest.raises(UriError, match="is a file, and no folder is known that it may lie in"):
        read_uri(str(tmp_path / "a.png"))


def test_a_record_keeps_its_reach_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    write_records(tmp_path / "x.parquet", [replace(GOOD, image="a.png")])
    record = pickle.loads(pickle.dumps(read_records(tmp_path)[0]))
    assert decode_image(record.image).tolist() == PIXELS.tolist()


@pytest.mark.parametrize("name", ["x.parquet", "set"])
def test_data_that_is_a_fifo_is_refused_before_anything_waits(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / ("set/x.parquet" if name == "set" else name))
    for read in (read_records, ParquetStore):
        with pytest.raises(UserError, match=r"x\.parquet: is a FIFO; allowed: a regular file"):
            read(tmp_path / name)


def test_half_a_body_is_no_image(port: int) -> None:
    with pytest.raises(UriError, match=rf"short\.png: ends after 20 of {len(PICTURE)} bytes"):
        read_uri(uri("http", "short.png", port))


def test_a_server_that_drips_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgen.data.uris.DEADLINE_S", 0.3)
    with pytest.raises(UriError, match=r"slow\.png: not read within 0\.3 s \(\d+ bytes were\)"):
        read_uri(uri("http", "slow.png", port))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("http://[x/a.png", "Invalid IPv6 URL"),
        ("file://[x", "names the host"),
        ("/a\0.png", "null byte"),
        ("file:///a%00.png", "null byte"),
        (f"http://{'a' * 64}.org/a.png", "label"),
        ("http:///a.png", "names no host"),
        ("http://127.0.0.1:x/a.png", "nonnumeric port"),
    ],
)
def test_what_is_no_uri_has_a_reason(given: str, says: str) -> None:
    with pytest.raises(UriError, match=says):
        read_uri(DataUri(given, Reach.of([Path("/")], ["127.0.0.1"])))
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
