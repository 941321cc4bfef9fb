"""`stages/score.py`: which prompt a picture has, what is shown of its scores, and a whole run of it."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deepgen.config import PoolSettings, UserError
from deepgen.data.records import Record
from deepgen.drawing.picture_files import PictureFolder
from rewards import RewardRequest, setting
from stages import score
from stages.scoring.picture_list import Found, find_pictures
from stages.scoring.score_sheet import SHOWN, sheet_html, thumbnail
from stages.scoring.score_table import Scored, console_text, parquet_bytes, sorted_by

BRIGHTNESS = "examples.own_reward.brightness:Brightness"


class Counted:
    """Scores light images high, "none" not at all, and writes down how many requests each call had."""

    class Options(PoolSettings):
        log: str = setting("", "File that gets a line for each call.")

    def __init__(self, options: Options) -> None:
        self.log = Path(options.log)

    def score(self, requests: list[RewardRequest]) -> list[float | None]:
        with self.log.open("a") as log:
            log.write("".join(f"{len(requests)} {one.prompt}\n" for one in requests))
        return [None if one.prompt == "none" else float(one.image.mean()) / 255 for one in requests]

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        return "skip" not in request.prompt


def save(path: Path, level: int = 128, side: int = 8) -> Path:
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)
    return path


def record(id: str, prompt: str) -> Record:
    return Record(id, "t2i", prompt, prompt, None, (), "test")


def drawn(folder: Path, *records: Record, samples: int = 1, level: int = 128) -> None:
    """Pictures as `stages/generate.py` leaves them."""
    pictures = PictureFolder(folder)
    with pictures.opened({"seed": 1}):
        for one in records:
            for sample in range(samples):
                pictures.save(one, sample, np.full((8, 8, 3), level, np.uint8))
    (folder / "sheet.png").write_bytes(b"a sheet")


def listed(folder: Path, *rows: Any) -> str:
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_of(found: Found) -> dict[str, str]:
    return {picture.file.name: picture.record.prompt for picture in found.pictures}


def test_drawn_pictures_say_their_prompts(tmp_path: Path) -> None:
    drawn(tmp_path, record("cat/1", "a cat"), record("x", 'the word "hi"'), samples=2)
    save(tmp_path / "other.png")
    found = find_pictures(tmp_path, None)
    assert sorted(prompts_of(found).values()) == ["a cat", "a cat", 'the word "hi"', 'the word "hi"']
    assert {picture.group for picture in found.pictures} == {("cat/1", "a cat"), ("x", 'the word "hi"')}
    (line,) = found.left_out  # the sheet is no picture of its own
    assert "other.png: has no prompt, as it was not drawn by stages/generate.py" in line


def test_a_list_names_pictures_by_file_by_what_they_say_and_by_id(tmp_path: Path) -> None:
    drawn(tmp_path, record("seven", "a dog"), record("dog", "a frog"))
    for name in ("first.png", "a-b-c_12.jpg", "plain.webp", "nobody.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    prompts = listed(
        tmp_path,
        {"prompt": "a cat", "image": "first.png"},
        {"prompt": "a cow", "id": "a-b-c"},
        {"prompt": "a hen", "id": "plain"},
        {"prompt": "a dog", "id": "dog"},
        {"id": "none"},
    )
    found = find_pictures(tmp_path, prompts)
    assert prompts_of(found) == {
        "first.png": "a cat",
        "a-b-c_12.jpg": "a cow",
        "plain.webp": "a hen",
        "seven-0.png": "a dog",  # by its prompt: ids of two lists say nothing
        "dog-0.png": "a dog",  # by its name, as no row has "a frog"
    }
    assert [line.partition(": ")[0].rpartition("/")[2] for line in found.left_out] == [
        "list.jsonl, row 5",
        "nobody.png",
    ]


def test_rows_that_cannot_be_told_apart_or_have_no_picture_are_told(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    row = {"prompt": "a cat", "image": "b.png", "source": "one"}
    rows = [row, row, {"prompt": "a dog", "image": "x/a.png"}, {"prompt": "a cow", "image": "y/a.png"}]
    found = find_pictures(tmp_path, listed(tmp_path, *rows, {"prompt": "a hen", "id": "c"}, {"prompt": "?", "id": "d"}))
    assert prompts_of(found) == {"b.png": "a cat", "c.png": "a hen"}
    twice, lone = found.left_out
    assert twice.endswith("list.jsonl with different contents name it as image") and "/a.png: two rows of" in twice
    assert lone.endswith("list.jsonl: 4 of 6 usable rows have no picture, first 'list-2'")


def test_sources_of_a_list_reach_the_rewards(tmp_path: Path) -> None:
    save(tmp_path / "source.gif", 7, 16)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    save(pictures / "it.png", 9)
    row = {"prompt": "make it blue", "answer": "a blue cat", "image": "pictures/it.png", "references": ["source.gif"]}
    (picture,) = find_pictures(pictures, listed(tmp_path, row)).pictures
    request = picture.request()
    assert (request.task, request.answer) == ("edit", "a blue cat")
    assert request.image[0, 0, 0] == 9 and request.references[0].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (None, "has a prompt; the first: "),
        ("", "--prompts: the prompt is empty"),
        (os.fsdecode(b"a \xff"), "--prompts: got bytes that are no UTF-8"),
        ("nowhere.jsonl", "--prompts: there is no file 'nowhere.jsonl'"),
    ],
)
def test_no_prompts_are_one_line(tmp_path: Path, prompts: str | None, says: str) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match=re.escape(says)):
        find_pictures(tmp_path, prompts)


def test_a_folder_without_pictures_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--images: .* has no picture in it; allowed: \.png, "):
        find_pictures(tmp_path, "a cat")
    with pytest.raises(UserError, match="is no folder"):
        find_pictures(tmp_path / "nowhere", "a cat")


def test_pictures_of_a_prompt_stay_together_where_a_reward_compares_them(tmp_path: Path) -> None:
    drawn(tmp_path, record("a", "a cat"), record("b", "a dog"), samples=2)
    pictures = find_pictures(tmp_path, None).pictures
    mixed = [pictures[place] for place in (0, 2, 1, 3)]
    assert [[one.record.id for one in part] for part in score.parts_of(mixed, by_prompt=True)] == [["a"] * 2, ["b"] * 2]
    pieces = score.parts_of(mixed * 20, by_prompt=False)
    assert [len(part) for part in pieces] == [64, 16] and [one for part in pieces for one in part] == mixed * 20


def test_odd_files_are_told_and_odd_names_can_be_shown(tmp_path: Path) -> None:
    """What is called like a picture is scored or told, and no name breaks a line, the table or the sheet."""
    save(tmp_path / "two\nlines.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes((tmp_path / "two\nlines.png").read_bytes())
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    found = find_pictures(tmp_path, "a cat")
    assert [picture.name for picture in found.pictures] == ["caf\\xe9.png", "two\nlines.png"]
    assert [line.partition(f"{tmp_path}/")[2] for line in found.left_out] == [
        "folder.png: a folder (1 of them; only what lies beside them is scored)",
        "gone.png: No such file or directory",
        "loop.png: Too many levels of symbolic links",
        "pipe.png: is a FIFO; allowed: a regular file",
    ]
    scored = [Scored(one.name, "", "a cat", "t2i", {"one": 1.0}, b"") for one in found.pictures]
    assert "caf\\xe9.png" in sheet_html(scored, ["one"], "odd").encode().decode() and parquet_bytes(scored, ["one"])
    assert "  two\\nlines.png  a cat" in console_text(scored, ["one"])


def test_the_bytes_of_a_file_decide_whether_it_is_a_picture(tmp_path: Path) -> None:
    drawn(tmp_path, record("dog", "a dog"))
    for name in ("noext", "odd.svg"):
        save(tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "real.svg").write_text("<svg/>")
    (tmp_path / ".hidden").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for number in range(12):
        (tmp_path / f"z-{number:02}.bin").write_text("no picture")
    (tmp_path / "noext.txt").write_text("a caption")
    found = find_pictures(
        tmp_path, listed(tmp_path, *({"id": id, "prompt": "a cat"} for id in ("noext", "odd", "dog")))
    )
    assert set(prompts_of(found)) == {"dog-0.png", "noext", "odd.svg"}
    pipe, svg, *texts, more = [line.removeprefix(f"{tmp_path}/") for line in found.left_out]
    assert pipe == "pipe: is a FIFO; allowed: a regular file"
    assert svg.startswith("real.svg: no picture (cannot identify image file; allowed: PNG, JPEG")
    assert [text[:9] for text in texts] == [f"z-{number:02}.bin:"[:9] for number in range(8)]
    assert more == f"4 more files in {tmp_path} that are no pictures"


def test_large_pictures_are_fewer_at_once(tmp_path: Path) -> None:
    save(tmp_path / "a.png", side=100)
    (small,) = find_pictures(tmp_path, "a cat").pictures
    assert small.pixels == 10_000
    photo, half = replace(small, pixels=24_000_000), replace(small, pixels=score.PIXELS // 2)
    parts = score.parts_of([photo] * 9, by_prompt=False)
    assert [len(part) for part in parts] == [2, 2, 2, 2, 1] and score.at_once(parts) == 5
    assert [len(part) for part in score.parts_of([small, half, half], by_prompt=False)] == [1, 1, 1]
    assert (
        score.at_once([[half] * 3]) == 1 and score.at_once([[small] * 64]) == 4 and score.at_once([[small] * 8]) == 32
    )


def rows() -> list[Scored]:
    small = thumbnail(np.zeros((400, 200, 3), np.uint8))
    late = ("deadline", "judge #0: 20 s <late>")
    return [
        Scored("b.png", "b", "<script>alert(1)</script>", "t2i", {"one": 0.25, "two": late}, small),
        Scored("a&b.png", "a", "a cat", "t2i", {"one": ("died", ""), "two": -3.0}, small),
        Scored("c.png", "c", "a dog\n" * 40, "t2i", {"one": 0.75, "two": late}, small),
    ]


def test_a_missing_score_is_null_with_a_reason_and_last(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(rows(), ["one", "two"]))
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column("score/one").to_pylist() == [0.25, None, 0.75]
    assert table.column("missing/one").to_pylist() == [None, "died", None]
    assert table.column("missing/two").to_pylist()[0] == "deadline: judge #0: 20 s <late>"
    assert [row.file for row in sorted_by(rows(), "one")] == ["c.png", "b.png", "a&b.png"]
    assert [row.file for row in sorted_by(rows(), "two")] == ["a&b.png", "b.png", "c.png"]
    text = console_text(rows(), ["one", "two"])
    assert re.search(r"^one +2 +1 +0\.5000 +0\.3536 +0\.2500 +0\.5000 +0\.7500$", text, re.MULTILINE)
    assert "  2 x deadline: judge #0: 20 s <late>" in text
    nothing = [Scored("a", "", "p", "t2i", {"one": ("died", "")}, b"")]
    assert re.search(r"^one +0 +1( +-){5}$", console_text(nothing, ["one"]), re.MULTILINE)


def test_escapes_of_a_terminal_are_shown_plainly() -> None:
    scores: dict[str, float | tuple[str, str]] = {"one": 0.5, "two": ("died", "\x1b]0;")}
    text = console_text([Scored("a\x1b.png", "", "a \x1b[2J cat", "t2i", scores, b"")], ["one", "two"])
    assert "\x1b" not in text and "a\\x1b.png  a [2J cat" in text and "died: ]0;" in text


def test_the_sheet_loads_nothing_and_escapes_what_strangers_wrote() -> None:
    page = sheet_html(rows(), ["one", "two"], "<b>title")
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;title" in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert re.findall(r'class="file">([^<]*)<', page) == ["c.png", "b.png", "a&amp;b.png"]
    assert 'class="missing" title="judge #0: 20 s &lt;late&gt;">deadline<' in page
    assert (
        "#by1:checked ~ main .r1" in page and page.count('<tr class="r1"><td>two</td>') == 3
    )  # the chosen one is bold
    assert re.findall(r"--o0:(\d);--o1:(\d)", page) == [("0", "1"), ("1", "2"), ("2", "0")]


def test_a_long_sheet_has_the_best_and_the_worst() -> None:
    many = [Scored(f"{n}.png", "", "a cat", "t2i", {"one": float(n)}, b"") for n in range(SHOWN + 2)]
    page = sheet_html(many, ["one"], "many")
    there = re.findall(r'class="file">(\d+).png<', page)
    assert "2,002 pictures; the best 1,000 and the worst 1,000 by one are shown" in page
    assert len(there) == SHOWN and there[0] == str(SHOWN + 1) and there[-1] == "0"
    assert str(SHOWN // 2) not in there


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["score.py", *options])
    assert score.main() == 0


@pytest.mark.ray
def test_a_folder_is_scored_once(
    ray_local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, log = tmp_path / "pictures", tmp_path / "out", tmp_path / "log"
    drawn(folder, record("cat", "a cat"), samples=2, level=51)
    drawn(folder, record("none", "none"), record("skip", "skip it"), level=255)
    drawn(folder, record("half", "half"))
    (folder / "half-0.png").write_bytes((folder / "half-0.png").read_bytes()[:-30])
    save(folder / os.fsdecode(b"odd\xff.png"))
    rewards = f"tests.stages.test_score:Counted,{BRIGHTNESS}"
    options = ["--rewards", rewards, "--images", str(folder), "--out", str(out), f"rewards.counted.log={log}"]
    run(monkeypatch, *options)
    told = capsys.readouterr().out
    assert re.search(r"left out: .*half-0\.png: picture: not a readable image", told)
    assert re.search(r"left out: .*odd\\udcff\.png: has no prompt", told)
    assert re.search(r"^counted +2 +2 ", told, re.MULTILINE) and "look at" in told
    table = {row["file"]: row for row in pq.read_table(out / "scores.parquet").to_pylist()}
    assert {file: row["score/counted"] for file, row in table.items()} == {
        "cat-0.png": pytest.approx(0.2),
        "cat-1.png": pytest.approx(0.2),
        "none-0.png": None,
        "skip-0.png": None,
    }
    assert table["none-0.png"]["missing/counted"] and table["skip-0.png"]["missing/counted"]
    assert table["none-0.png"]["score/brightness"] == pytest.approx(0.5)
    assert "skip it" in (out / "scores.html").read_text()
    assert "3 a cat\n3 a cat\n3 none\n" in log.read_text()  # in one call

    log.unlink()
    drawn(folder, record("new", "new"), level=0)
    run(monkeypatch, *options)
    asked = log.read_text()
    assert "2 new" in asked and "2 none" in asked and "cat" not in asked  # what has a score is not asked for again
    assert len(pq.read_table(out / "scores.parquet")) == 5
