"""Images in base64 in place of a path: `data:image/png;base64,iVBOR...`, or only the part behind the comma."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

from deepgen.reading.file_reader import too_large

_DATA = "data:"
# How the formats that have a signature begin in base64: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, QOI. No
# file name looks like this for so long, without a dot.
_BARE = re.compile(
    r"\s*(?:[/_]9j[/_]|iVBORw0KG|UklGR|R0lGOD|Qk[0-3]|SUkq|TU0AK|AAAA..{2}mdHlw|AAAA.{4}ZnR5c|AAAADGpQ|[/_]0[/_]{2}|UD[YUQM]|cW9p)"
    r"[A-Za-z0-9+/_\-\s]{48}"
)


def inline_uri(text: str) -> str | None:
    """The text as a data: URI if it is an image in base64, None if it is a path or another URI."""
    if text[: len(_DATA)].lower() == _DATA:
        return text
    return f"{_DATA};base64,{text}" if _BARE.match(text) else None


def is_inline(uri: str) -> bool:
    return uri[: len(_DATA)].lower() == _DATA


def read_inline(uri: str, limit: int) -> bytes:
    """The bytes in a data: URI, at most `limit`. Raises ValueError if they are not in base64, OSError if too many."""
    head, comma, text = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("data: without base64; allowed: data:image/...;base64,...")
    text = "".join(unquote(text).split() if "%" in text else text.split()).translate({45: "+", 95: "/"})
    if len(text) // 4 * 3 > limit:
        raise too_large(limit)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
