"""Damaged and hostile inputs, each a function of its seed: what the readers of data, recipes and runs may be handed."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms

from deepgen.data.images import FORMATS

# What begins another format than the file's name says, among them those whose decoders start programs.
_HEADS = (
    *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x00"),
    *(
        b"<svg xmlns='http://www.w3.org/2000/svg'>",
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>",
    ),
    *(b"#!/bin/sh\ntouch started\n", b"MZ", b"\x7fELF", b"ARROW1\x00\x00", b"PAR1", b"BZh9", b"\xfd7zXZ\x00"),
    *(
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"II*\x00",
        b"MM\x00*",
        b"RIFF\xff\xff\xff\xffWEBP",
        b"\x80\x04\x95",
    ),
)
_TOKENS = (
    *("null", "true", "NaN", "-Infinity", "1e400", "1" * 5000, "-0", "''", '""', "[]", "{}", "[" * 3000, "{" * 500),
    *('{"a":' * 400, "\\ud800", "\\u0000", "\x00", "\ufeff", "\u2028", "\r", "\n", "\t", ",", ":", "&a [*a]", "*a"),
    *("!!python/object/apply:os.system ['touch started']", "<<: *a", "? [a]: b", "---", "%YAML 9.9", "|", ">-", "0o17"),
    *(
        "../../private",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "~/x",
        "$HOME/x",
        "%2e%2e/%00",
        "file:///etc/passwd",
    ),
    *(
        "<|im_end|>",
        "<|image_pad|>",
        "{{prompt}}",
        "${HOME}",
        "data:image/png;base64,AAAA",
        "a" * 10_000,
        "牌子",
        "\u202e",
        "☃️",
    ),
)
_ODD_MEMBERS = (
    ("../climbs.txt", tarfile.REGTYPE, ""),
    ("link.txt", tarfile.SYMTYPE, "/etc/passwd"),
    ("hard.png", tarfile.LNKTYPE, "../../x"),
    ("pipe.png", tarfile.FIFOTYPE, ""),
    ("device.png", tarfile.CHRTYPE, ""),
)
_WORDS = "a sign with the word “ok” in 字 red"


def damaged(chance: random.Random, seed: bytes, other: bytes) -> bytes:
    """A valid input with one to four pieces changed, cut, repeated, exchanged or taken from another input."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        end = min(end, at + chance.choice((1, 4, 64, 100_000)))
        kind = chance.randrange(9)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * chance.choice((1, 2, 50))
        elif kind == 4:
            data[at:end] = chance.randbytes(end - at)
        elif kind == 5:
            data[at : at + 4] = chance.choice(
                (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80")
            )
        elif kind == 6:
            data[at:end] = chance.choice(_TOKENS).encode("utf-8", "surrogatepass")
        elif kind == 7:
            data[: chance.choice((0, 4, 16))] = chance.choice(_HEADS)
        else:
            data[at:end] = other[: chance.randrange(len(other) + 1)]
    return bytes(data)


# ---------------------------------------------------------------- valid inputs to begin with


@cache
def pictures() -> tuple[bytes, ...]:
    """Small pictures in all formats that are taken, and modes, profiles, orientations and frames."""
    found, noise = [], np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in FORMATS:
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16", "CMYK"):
            image = (
                Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
                if mode == "I;16"
                else Image.fromarray(noise).convert(mode)
            )
            for more in (
                {},
                {"icc_profile": profile},
                {"exif": exif},
                {"save_all": True, "append_images": [image.copy()]},
            ):
                stream = io.BytesIO()
                try:
                    image.save(stream, kind, **more)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # this format has no such mode or extra
                found.append(stream.getvalue())
    return tuple(dict.fromkeys(found))


def picture(chance: random.Random) -> bytes:
    """One of them, damaged; one in ten begins as something else altogether."""
    seed, other = chance.choices(pictures(), k=2)
    if chance.random() < 0.1:
        return chance.choice(_HEADS) + seed[chance.randrange(len(seed)) :]
    return damaged(chance, seed, other)


@cache
def tars() -> tuple[bytes, ...]:
    """Web data sets: pairs, edits, captions in JSON; plain and compressed; half with links and names that climb."""
    found = []
    modes: tuple[Literal["w", "w:gz", "w:xz"], ...] = ("w", "w:gz", "w:xz")
    for mode, odd in itertools.product(modes, (False, True)):
        for names in (("{}.png", "{}.txt"), ("{}.png", "{}.json"), ("{}.source.png", "{}.target.png", "{}.txt")):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode=mode) as archive:
                for number in range(2):
                    for name in names:
                        if "png" in name:
                            content = pictures()[number]
                        else:
                            content = (
                                json.dumps({"caption": _WORDS}).encode() if name.endswith("json") else _WORDS.encode()
                            )
                        member = tarfile.TarInfo(name.format(number))
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
                for name, kind, link in _ODD_MEMBERS if odd else ():
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = kind, link
                    archive.addfile(member)
            found.append(stream.getvalue())
    return tuple(found)


@cache
def tables() -> tuple[tuple[str, bytes], ...]:
    """(file name, content) of records and hf tables in parquet and Arrow."""
    image = list(pictures()[:2])
    records = {
        "id": ["a", "b"],
        "task": ["t2i", "edit"],
        "prompt": [_WORDS, "brighter"],
        "answer": ["ok", ""],
        "image": image,
        "references": [[], image[:1]],
        "source": ["x", "x"],
    }
    hugging = {
        "image": [{"bytes": image[0], "path": "a.png"}, {"bytes": None, "path": "../x.png"}],
        "text": [_WORDS, "b"],
    }
    found = []
    for content in (records, hugging):
        table = pa.table(content)
        for options in (
            {},
            {"compression": "zstd"},
            {"use_dictionary": False, "row_group_size": 1},
            {"version": "1.0"},
        ):
            stream = io.BytesIO()
            pq.write_table(table, stream, **options)
            found.append(("data.parquet", stream.getvalue()))
        for writer, name in ((pa.ipc.new_stream, "stream.arrow"), (pa.ipc.new_file, "file.arrow")):
            stream = io.BytesIO()
            with writer(stream, table.schema) as sink:
                sink.write_table(table)
            found.append((name, stream.getvalue()))
    return tuple(found)


_LISTS = (
    [{"image": "a.png", "annotation": "a.txt"}],
    [{"file_name": "a.png", "text": _WORDS}],
    [{"id": "a", "task": "t2i", "prompt": _WORDS, "answer": "", "image": "a.png", "references": [], "source": "x"}],
    [{"image": "a.png", "annotation": "a.txt"}, {"image": "../b.png", "annotation": "../private.json"}],
    [{"image": "a.png", "txt": _WORDS}, {"image": "data:image/png;base64,iVBORw0KGgo=", "txt": "b"}],
    [{"input_image": "a.png", "output_image": "/etc/passwd", "instruction": _WORDS}],
    [{"file_name": "a.png", "text": _WORDS}, {"file_name": "http://127.0.0.1/x", "text": "b"}],
    [{"id": "a", "task": "t2i", "prompt": _WORDS, "answer": "", "references": []}],
    [_WORDS, "b"],
)


@cache
def lists() -> tuple[tuple[str, bytes], ...]:
    """(file name, content) of lists in JSON, JSON lines, CSV and text, plain and gzipped."""
    found: list[tuple[str, bytes]] = []
    for rows in _LISTS:
        found.append(("data.json", json.dumps(rows, ensure_ascii=False).encode()))
        found.append(("data.jsonl", "\n".join(json.dumps(row) for row in rows).encode()))
        if isinstance(rows[0], dict):
            head = list(rows[0])
            lines = [
                ",".join(head),
                *(",".join(f'"{row[key]}"' for key in head) for row in rows if isinstance(row, dict)),
            ]
            found.append(("metadata.csv", "\n".join(lines).encode()))
            found.append(("data.tsv", "\n".join(lines).replace(",", "\t").encode()))
    found.append(("prompts.txt", f"{_WORDS}\nb\n".encode()))
    return (*found, *((f"{name}.gz", gzip.compress(content, mtime=0)) for name, content in found))


# ---------------------------------------------------------------- addresses

_SCHEMES = (
    "http",
    "https",
    "s3",
    "gs",
    "file",
    "data",
    "ftp",
    "HTTP",
    "",
    "javascript",
    "hf",
    "smb",
    "gopher",
    "jar:file",
)
_HOSTS = (
    *("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "10.0.0.1", "[::ffff:127.0.0.1]", "2130706433"),
    *(
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "metadata.google.internal",
        "images.example.com",
        "[64:ff9b::7f00:1]",
        "bucket",
    ),
    *(
        "user:secret@images.example.com",
        "user@127.0.0.1",
        "a..b",
        "-",
        "xn--",
        "☃.net",
        "１２７.0.0.1",
        "[fe80::1%25lo]",
        "",
    ),
    *("images.example.com:0", "images.example.com:99999", "images.example.com:x", "a" * 300 + ".com", "[::"),
)
_PATHS = (
    *(
        "",
        "/",
        "/a.png",
        "/a b#c?d=%zz",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//127.0.0.1/x",
        "/字.png",
        "?x",
    ),
    *(
        "/a.png?X-Amz-Signature=abc&sig=1",
        "/a\r\nHost: x",
        "/a\x00b",
        "/" + "a" * 5000,
        "/image/png;base64,AAAA",
        ";x",
        "#",
    ),
    *("?endpoint_override=127.0.0.1", "?region=x&scheme=http&endpoint_override=http://169.254.169.254", "/a//b", "/."),
)


def address(chance: random.Random) -> str:
    """An address put together from parts, one in three with letters changed."""
    scheme, host, path = chance.choice(_SCHEMES), chance.choice(_HOSTS), chance.choice(_PATHS)
    separator = chance.choice((":", "://", "://", "://", ":///")) if scheme else ""
    text = (
        f"{scheme}{separator}{host}{path}" if chance.random() < 0.9 else chance.choice(("a.png", "./a.png", "%61.png"))
    )
    if chance.random() < 0.35:
        text = damaged(chance, text.encode(), chance.choice(_PATHS).encode()).decode("utf-8", "replace")
    return text


# ---------------------------------------------------------------- what a run and a recipe consist of


def damaged_file(chance: random.Random, file: Path) -> None:
    """Damage a file in place."""
    content = file.read_bytes()
    file.write_bytes(damaged(chance, content, content[::-1]))


def choose(chance: random.Random, seeds: Callable[[], tuple[tuple[str, bytes], ...]]) -> tuple[str, bytes]:
    """Name and damaged content of one of these files."""
    (name, content), (_, other) = chance.choices(seeds(), k=2)
    return name, damaged(chance, content, other)
