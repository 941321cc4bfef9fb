"""Fonts for the pictures of samples: DejaVu Sans from matplotlib's wheel, so that they look the same on every machine.

A text with letters that DejaVu lacks (Chinese, say) is set in the installed font that has most of them. Letters that
no font has are drawn as boxes; `boxes_note` says so.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

_ODD_STYLE = re.compile(r"bold|italic|oblique|light|thin|black|mono|serif", re.IGNORECASE)


def font(size: int, *, bold: bool = False, text: str = "") -> ImageFont.FreeTypeFont:
    """The font for a text, at `size` pixels. Only DejaVu is ever bold."""
    return _load(_file(text, bold), size)


def boxes_note(texts: Iterable[str]) -> str:
    """How many different letters of these texts, each set in its `font`, are drawn as boxes; "" if none are."""
    boxes = {letter for text in texts for letter in _letters(text) - _has(_file(text))}
    if not boxes:
        return ""
    return f"Boxes: {len(boxes)} letters that no font on this machine has (Chinese is in Noto Sans CJK, for example)."


def _file(text: str, bold: bool = False) -> Path:
    letters, usual = _letters(text), _dejavu(bold)
    return usual if letters <= _has(usual) else max((usual, *_installed()), key=lambda path: len(letters & _has(path)))


def _letters(text: str) -> frozenset[int]:
    """The code points of a text that need a glyph and that not every font has."""
    return frozenset() if text.isascii() else frozenset(ord(x) for x in set(text) if _is_drawn(x))


def _is_drawn(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind[0] not in "ZC" and not "\ufe00" <= letter <= "\ufe0f"  # no spaces, joiners and variation selectors


@cache
def _dejavu(bold: bool) -> Path:
    package = find_spec("matplotlib")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("matplotlib is not installed; its fonts draw the grids (it comes with mlflow)")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / name


@cache
def _load(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _installed() -> list[Path]:
    """The fonts of this machine, plain ones first: of fonts with equally many letters, the first is taken."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(map(Path, findSystemFonts()), key=lambda path: (bool(_ODD_STYLE.search(path.name)), path.name))


@cache
def _has(path: Path) -> frozenset[int]:
    """The code points that a font can draw; none for a font of fixed sizes, or one that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(str(path))
    except (OSError, RuntimeError):  # what lies in the machine's font folders may be damaged
        return frozenset()
    return frozenset(face.get_charmap()) if face.scalable else frozenset()
