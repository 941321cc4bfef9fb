"""Pictures of samples: grids with captions and scores, and before/after comparisons.

Text is set in DejaVu Sans from matplotlib's wheel, so that pictures look the same on every machine; a text with letters
that it lacks (Chinese, say) in the installed font that has most of them. A note counts letters that no font has.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image | np.ndarray  # arrays: uint8 [H, W, 3]
Scores = Mapping[str, float | None]

PAGE, CARD_LINE, RULE = "#ffffff", "#d5d9e0", "#e4e7ec"
INK, SOFT, GOOD, BAD = "#1d2129", "#6a7280", "#1a7f37", "#c62828"
MARGIN, GAP = 24, 14
_SCORE_SIZE, _TEXT_SIZE, _SMALL_SIZE = 13, 14, 12
_SAME = 0.01  # smaller changes get no colour
_ODD_STYLE = re.compile(r"bold|italic|oblique|light|thin|black|mono|serif", re.IGNORECASE)


@dataclass(frozen=True)
class GridRow:
    """One prompt of a before/after grid. Scores are the means over the prompt's samples; None = missing."""

    prompt: str
    before: Sequence[Picture]
    after: Sequence[Picture]
    before_scores: Scores = field(default_factory=dict)
    after_scores: Scores = field(default_factory=dict)
    references: Sequence[Picture] = ()
    task: str = ""


def image_grid(
    images: Sequence[Picture],
    captions: Sequence[str],
    scores: Sequence[Scores] | None = None,
    columns: int = 6,
    *,
    title: str = "",
    sources: Sequence[Picture | None] | None = None,
    cell: int = 160,
) -> Image.Image:
    """Pictures in `columns` columns, each with its caption (wrapped, at most 3 lines) and one line per score.

    sources: for each picture, the image it was edited from (shown small beside the caption) or None.
    cell: edge of a picture in the grid, in pixels. Raises ValueError if the sequences differ in length.
    """
    count = len(images)
    tables = [{} for _ in images] if scores is None else list(scores)
    origins = [None] * count if sources is None else list(sources)
    if not count or not len(captions) == len(tables) == len(origins) == count:
        raise ValueError(f"{count} images, {len(captions)} captions, {len(tables)} scores, {len(origins)} sources")
    columns = min(columns, count)
    cards = [_card(*parts, cell) for parts in zip(images, captions, tables, origins, strict=True)]
    lines = [cards[start : start + columns] for start in range(0, count, columns)]
    heights = [max(card.height for card in line) for line in lines]
    top = MARGIN + (_line_height(20) + GAP if title else 0)
    width = 2 * MARGIN + columns * cell + (columns - 1) * GAP
    bottom = top + sum(heights) + GAP * (len(lines) - 1)
    note = _note_lines(captions, width)
    page = Image.new("RGB", (width, bottom + len(note) * _line_height(_SMALL_SIZE) + MARGIN), PAGE)
    if title:
        ImageDraw.Draw(page).text((MARGIN, MARGIN - 4), title, INK, font=font(20, bold=True))
    _draw_note(page, note, bottom)
    for line, height in zip(lines, heights, strict=True):
        for column, card in enumerate(line):
            page.paste(card, (MARGIN + column * (cell + GAP), top))
        top += height + GAP
    return page


def before_after_grid(
    path: Path, rows: Sequence[GridRow], *, title: str = "Before and after", subtitle: str = "", cell: int = 128
) -> Image.Image:
    """Draw one line per prompt: prompt, source image (edits), samples before, samples after, mean scores. Save as PNG.

    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a before/after grid needs at least one row")
    layout = _Layout.of(rows, cell)
    heights = [max(cell, _prompt_height(row, layout), _scores_height(row)) for row in rows]
    head = MARGIN + _line_height(22) + (_line_height(_TEXT_SIZE) + 4 if subtitle else 0) + GAP
    top = head + _line_height(_SMALL_SIZE) + 10
    bottom = top + sum(heights) + (2 * GAP) * len(rows) - GAP
    note = _note_lines([row.prompt for row in rows], layout.width)
    page = Image.new("RGB", (layout.width, bottom + len(note) * _line_height(_SMALL_SIZE) + MARGIN), PAGE)
    _draw_note(page, note, bottom)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 6), title, INK, font=font(22, bold=True))
    if subtitle:
        draw.text((MARGIN, MARGIN + _line_height(22)), subtitle, SOFT, font=font(_TEXT_SIZE))
    for left, text in layout.headings():
        draw.text((left, head), text, SOFT, font=font(_SMALL_SIZE, bold=True))
    for row, height in zip(rows, heights, strict=True):
        draw.line((MARGIN, top, layout.width - MARGIN, top), RULE, 1)
        _draw_row(page, draw, row, layout, top + GAP, height)
        top += height + 2 * GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return page


def wrap(text: str, width: float, face: ImageFont.FreeTypeFont, max_lines: int = 3) -> list[str]:
    """Lines of at most `width` pixels. Long words are broken; text that does not fit ends in an ellipsis."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        candidate = f"{current} {word}".strip()
        if len(candidate) <= width and face.getlength(candidate) <= width:  # hardly a letter is under a pixel wide
            current = candidate
            continue
        if current:
            lines.append(current)
        while len(lines) <= max_lines and (len(word) > width or face.getlength(word) > width):
            cut = _fitting(word, width, face)
            lines.append(word[:cut])
            word = word[cut:]
        current = word
        if len(lines) > max_lines:  # the rest is not shown, and may be long
            break
    lines = [line for line in [*lines, current] if line] or [""]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


def _fitting(word: str, width: float, face: ImageFont.FreeTypeFont) -> int:
    """How many letters of a word fit into `width` pixels, at least 1."""
    counts = range(1, min(len(word), int(width)) + 1)
    return max(1, bisect_right(counts, width, key=lambda count: face.getlength(word[:count])))


def fit(picture: Picture, cell: int) -> Image.Image:
    """The picture as RGB, scaled (Lanczos) to fit a square of `cell` pixels, with its aspect kept."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


# --- fonts ------------------------------------------------------------------------------------------------------------


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


# --- cards of image_grid ----------------------------------------------------------------------------------------------


def _card(picture: Picture, caption: str, scores: Scores, source: Picture | None, cell: int) -> Image.Image:
    """Picture, caption and scores, stacked, `cell` pixels wide."""
    thumb = 0 if source is None else cell // 3
    text_width = cell - (thumb + 8 if thumb else 0)
    face = font(_SMALL_SIZE, text=caption)
    lines = wrap(caption, text_width, face)
    text_height = max(len(lines) * _line_height(_SMALL_SIZE), thumb)
    height = cell + 6 + text_height + 4 + len(scores) * _line_height(_SMALL_SIZE)
    card = Image.new("RGB", (cell, height), PAGE)
    draw = ImageDraw.Draw(card)
    _paste(card, draw, picture, 0, 0, cell)
    y = cell + 6
    if source is not None:
        _paste(card, draw, source, 0, y, thumb)
    for line in lines:
        draw.text((cell - text_width, y), line, INK, font=face)
        y += _line_height(_SMALL_SIZE)
    y = cell + 6 + text_height + 4
    for name, value in scores.items():
        draw.text((0, y), name, SOFT, font=font(_SMALL_SIZE))
        draw.text((cell - 1, y), _score(value), INK, font=font(_SMALL_SIZE, bold=True), anchor="ra")
        y += _line_height(_SMALL_SIZE)
    return card


# --- rows of before_after_grid ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Left edges of the columns, in pixels."""

    cell: int
    prompt_width: int
    sources: int  # source images a row can have
    before: int  # samples shown
    after: int
    score_width: int

    @classmethod
    def of(cls, rows: Sequence[GridRow], cell: int) -> _Layout:
        def most(get: str) -> int:
            return max(len(getattr(row, get)) for row in rows)

        name_width = change_width = 0.0
        for row in rows:
            for name in _score_names(row):
                name_width = max(name_width, font(_SCORE_SIZE).getlength(name))
                change_width = max(change_width, font(_SCORE_SIZE, bold=True).getlength(_change(row, name)))
        score_width = math.ceil(name_width + 16 + change_width) if change_width else 0
        return cls(cell, 210, most("references"), most("before"), most("after"), score_width)

    def _span(self, count: int) -> int:
        return count * self.cell + max(0, count - 1) * 6 + (2 * GAP if count else 0)

    @property
    def source_left(self) -> int:
        return MARGIN + self.prompt_width + GAP

    @property
    def before_left(self) -> int:
        return self.source_left + self._span(self.sources)

    @property
    def after_left(self) -> int:
        return self.before_left + self._span(self.before)

    @property
    def score_left(self) -> int:
        return self.after_left + self._span(self.after)

    @property
    def width(self) -> int:
        return self.score_left + self.score_width + MARGIN

    def headings(self) -> list[tuple[int, str]]:
        found = [(MARGIN, "PROMPT"), (self.before_left, "BEFORE"), (self.after_left, "AFTER")]
        if self.sources:
            found.append((self.source_left, "SOURCE"))
        if self.score_width:
            found.append((self.score_left, "MEAN SCORE"))
        return found


def _draw_row(page: Image.Image, draw: ImageDraw.ImageDraw, row: GridRow, at: _Layout, top: int, height: int) -> None:
    y = top + (height - _prompt_height(row, at)) // 2
    if row.task:
        draw.text((MARGIN, y), row.task, SOFT, font=font(_SMALL_SIZE))
        y += _line_height(_SMALL_SIZE) + 2
    for line in _prompt_lines(row, at):
        draw.text((MARGIN, y), line, INK, font=font(_TEXT_SIZE, text=row.prompt))
        y += _line_height(_TEXT_SIZE)
    middle = top + (height - at.cell) // 2
    columns = ((at.source_left, row.references), (at.before_left, row.before), (at.after_left, row.after))
    for left, pictures in columns:
        for index, picture in enumerate(pictures):
            _paste(page, draw, picture, left + index * (at.cell + 6), middle, at.cell)
    y = top + (height - _scores_height(row)) // 2
    for name in _score_names(row):
        draw.text((at.score_left, y), name, SOFT, font=font(_SCORE_SIZE))
        right = (at.score_left + at.score_width, y)
        draw.text(right, _change(row, name), _colour(row, name), font=font(_SCORE_SIZE, bold=True), anchor="ra")
        y += _line_height(_SCORE_SIZE) + 3


def _change(row: GridRow, name: str) -> str:
    return f"{_score(row.before_scores.get(name))} → {_score(row.after_scores.get(name))}"


def _colour(row: GridRow, name: str) -> str:
    before, after = row.before_scores.get(name), row.after_scores.get(name)
    if before is None or after is None:
        return INK
    return GOOD if after - before > _SAME else BAD if after - before < -_SAME else INK  # NaN: neither


def _prompt_lines(row: GridRow, at: _Layout) -> list[str]:
    return wrap(row.prompt, at.prompt_width, font(_TEXT_SIZE, text=row.prompt), max_lines=6)


def _prompt_height(row: GridRow, at: _Layout) -> int:
    task = _line_height(_SMALL_SIZE) + 2 if row.task else 0
    return task + len(_prompt_lines(row, at)) * _line_height(_TEXT_SIZE)


def _score_names(row: GridRow) -> list[str]:
    return list(dict.fromkeys((*row.before_scores, *row.after_scores)))


def _scores_height(row: GridRow) -> int:
    return len(_score_names(row)) * (_line_height(_SCORE_SIZE) + 3)


# --- shared -----------------------------------------------------------------------------------------------------------


def _paste(page: Image.Image, draw: ImageDraw.ImageDraw, picture: Picture, x: int, y: int, cell: int) -> None:
    """Centre the picture in a framed square."""
    image = fit(picture, cell - 2)
    page.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=CARD_LINE)


def _note_lines(texts: Sequence[str], width: int) -> list[str]:
    """The lines below a page of this width that say which letters could not be drawn; [] if all could."""
    note = boxes_note(texts)
    return wrap(note, width - 2 * MARGIN, font(_SMALL_SIZE)) if note else []


def _draw_note(page: Image.Image, lines: Sequence[str], bottom: int) -> None:
    for number, line in enumerate(lines):
        place = (MARGIN, bottom + 6 + number * _line_height(_SMALL_SIZE))
        ImageDraw.Draw(page).text(place, line, SOFT, font=font(_SMALL_SIZE))


def _score(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _line_height(size: int) -> int:
    return round(size * 1.35)
