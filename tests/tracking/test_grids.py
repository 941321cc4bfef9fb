"""Grids: geometry, wrapping, scaling, and the position of each picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepgen.tracking.grids import GridRow, before_after_grid, boxes_note, fit, font, image_grid, wrap

RED, BLUE = (220, 30, 30), (30, 30, 220)


def flat(colour: tuple[int, int, int], size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), colour, np.uint8)


def pixels(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == np.array(colour, np.uint8)).all(axis=-1).sum())


def test_wrap_keeps_to_the_width_and_ends_in_an_ellipsis() -> None:
    face = font(12)
    text = "a very long caption about a purple dinosaur that goes on and on " * 3
    lines = wrap(text, 160, face)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(face.getlength(line) <= 160 for line in lines)
    assert wrap("short", 160, face) == ["short"]
    assert wrap("", 160, face) == [""]


def test_wrap_breaks_a_word_without_spaces_and_loses_nothing() -> None:
    word = "https://example.org/" + "x" * 60
    lines = wrap(word, 100, font(12), max_lines=10)
    assert "".join(lines) == word
    assert all(font(12).getlength(line) <= 100 for line in lines)


def test_fit_enlarges_and_shrinks_and_keeps_the_aspect() -> None:
    assert fit(flat(RED), 160).size == (160, 160)
    assert fit(Image.new("RGB", (200, 100)), 50).size == (50, 25)
    assert fit(np.zeros((64, 32, 3), np.uint8), 160).size == (80, 160)


def test_grid_shows_every_picture_and_source() -> None:
    grid = image_grid(
        [flat(RED), flat(BLUE), flat(RED)],
        ["a red square", "make it blue", "another"],
        [{"judge": 0.91, "ocr": None}, {"judge": 0.2}, {}],
        columns=2,
        sources=[None, flat((10, 200, 10)), None],
        title="step 40",
        cell=130,
    )
    assert pixels(grid, RED) == 2 * 128 * 128
    assert pixels(grid, BLUE) == 128 * 128
    assert pixels(grid, (10, 200, 10)) == (130 // 3 - 2) ** 2
    assert grid.width == 2 * 24 + 2 * 130 + 14


def test_grid_refuses_sequences_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        image_grid([flat(RED), flat(RED)], ["one"])
    with pytest.raises(ValueError, match="0 images"):
        image_grid([], [])


def test_before_after_grid_is_saved_with_all_its_pictures(tmp_path: Path) -> None:
    rows = [
        GridRow("a red square", [flat(RED)] * 2, [flat(BLUE)] * 2, {"judge": 0.2}, {"judge": 0.8}, task="t2i"),
        GridRow("make it blue", [flat(RED)] * 2, [flat(BLUE)] * 2, references=[flat((10, 200, 10))], task="edit"),
    ]
    path = tmp_path / "plots" / "grid.png"
    grid = before_after_grid(path, rows, title="T", subtitle="s", cell=130)
    saved = Image.open(path)
    assert saved.size == grid.size
    assert pixels(saved.convert("RGB"), RED) == pixels(saved.convert("RGB"), BLUE) == 4 * 128 * 128
    assert pixels(saved.convert("RGB"), (10, 200, 10)) == 128 * 128


def test_a_rise_is_green_and_a_fall_red(tmp_path: Path) -> None:
    def row(before: float, after: float) -> GridRow:
        return GridRow("x", [flat(RED)], [flat(BLUE)], {"judge": before}, {"judge": after})

    green, red = (0x1A, 0x7F, 0x37), (0xC6, 0x28, 0x28)
    up = before_after_grid(tmp_path / "up.png", [row(0.2, 0.8)])
    down = before_after_grid(tmp_path / "down.png", [row(0.8, 0.2)])
    assert pixels(up, green) > 20
    assert pixels(up, red) == 0
    assert pixels(down, red) > 20
    assert pixels(down, green) == 0


def test_before_after_grid_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        before_after_grid(tmp_path / "x.png", [])


# -- letters that DejaVu lacks ---------------------------------------------------------------------------------------

CHINESE = "".join(chr(0x4E00 + i) for i in range(3000))


class Counting:
    """A face whose letters are 12 pixels wide, and that counts how many letters it has measured."""

    measured = 0

    def getlength(self, text: str) -> float:
        self.measured += len(text)
        return 12.0 * len(text)


@pytest.mark.parametrize("text", [CHINESE, "a " + CHINESE, "a cat " * 100_000, "x" * 1_000_000])
def test_only_what_is_shown_of_a_long_caption_is_measured(text: str) -> None:
    face = Counting()
    lines = wrap(text, 160, face, max_lines=6)  # type: ignore[arg-type]
    assert len(lines) == 6 and lines[5].endswith("…") and max(map(len, lines)) <= 13
    assert "".join(text.split()).startswith("".join("".join(lines).split())[:-1])
    assert face.measured < 10_000


def make_font(path: Path, letters: str) -> Path:
    """A font with these letters as black squares, and nothing else."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The fonts of the machine; empty until a test adds some."""
    fonts: list[Path] = []
    monkeypatch.setattr("deepgen.tracking.grids._installed", lambda: fonts)
    return fonts


def test_a_caption_is_set_in_an_installed_font_that_has_its_letters(tmp_path: Path, installed: list[Path]) -> None:
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    installed += [
        tmp_path / "damaged.ttf",
        make_font(tmp_path / "few.ttf", "你"),
        make_font(tmp_path / "a.ttf", "你好a "),
    ]
    assert font(12, text="a 你好") is font(12, text="好") and font(12, text="好").getname()[0] == "Squares"
    assert font(12, text="a cat, été, кот, “x”") is font(12)
    assert boxes_note(["你好", "a cat"]) == ""
    shown = image_grid([flat(RED)], ["你好你好"])
    assert pixels(shown, (0x1D, 0x21, 0x29)) > 4 * 60


def test_a_sheet_says_which_letters_are_boxes(tmp_path: Path, installed: list[Path]) -> None:
    assert boxes_note(["a cat \u200d\ufe0f", "你好", "你们"]).startswith(
        "Boxes: 3 letters that no font on this machine has"
    )
    plain, noted = (image_grid([flat(RED)] * 3, [caption] * 3) for caption in ("a cat", "你好"))
    assert noted.height > plain.height
    row = GridRow("你好", [flat(RED)], [flat(BLUE)])
    pages = [before_after_grid(tmp_path / "x.png", [one]) for one in (row, GridRow("a cat", row.before, row.after))]
    assert pages[0].height > pages[1].height


def test_a_sheet_of_long_chinese_captions_is_drawn(tmp_path: Path, installed: list[Path]) -> None:
    installed.append(make_font(tmp_path / "all.ttf", CHINESE))
    assert image_grid([flat(RED)] * 24, [CHINESE] * 24).width > 900
