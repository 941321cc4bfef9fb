"""Small ICC profiles (version 2), written byte by byte: Pillow can only make sRGB, XYZ and Lab."""

from __future__ import annotations

import struct
from itertools import product

# Adobe RGB (1998): its primaries adapted to D50, and its gamma of 2.2 (563 / 256).
_ADOBE = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}
_D50 = (0.9642, 1.0, 0.8249)


def adobe_rgb() -> bytes:
    tags = {name: _xyz(color) for name, color in _ADOBE.items()}
    curve = _curve(563 / 256)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def press() -> bytes:
    """CMYK with inks as pale as on newsprint: a table from no and full ink of each to Lab (8 bits)."""
    corners = [(100 - 40 * (c + m + y) / 3 - 50 * k, -30 * c + 40 * m, -30 * c + 60 * y) for c, m, y, k in _inks()]
    table = bytes(v for L, a, b in corners for v in (round(max(L, 0) * 2.55), round(a + 128), round(b + 128)))
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + table + straight * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def _inks() -> list[tuple[int, ...]]:
    return list(product((0, 1), repeat=4))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text(b"test"), b"wtpt": _xyz(_D50), **tags}
    entries, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        entries += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), bytes(4), 0x02400000, kind, space, connection)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(_D50)[8:]
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + entries + data


def _xyz(color: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in color))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def _text(text: bytes) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
