"""What is read for drawing: prompts, lists of them, records, and their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deepgen.data.records import Record
from deepgen.drawing.prompts import Reader, read_wanted
from deepgen.errors import UserError
from tests.helpers.factories import make_tiny_folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(make_tiny_folder(tmp_path_factory.mktemp("model")) / "tokenizer", 200, 128, 64)


def wanted(
    reader: Reader, given: str | Path, *images: Path, limit: int | None = None
) -> tuple[list[Record], list[str]]:
    records, bad = read_wanted(str(given), images, reader, limit=limit)
    return records, [f"{Path(one.place).name}: {one.reason}" for one in bad]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_prompt_is_drawn_alike_wherever_it_stands(tmp_path: Path, reader: Reader) -> None:
    (alone,), _ = wanted(reader, "a red cat")
    assert alone.id.startswith("a-red-cat-")
    (tmp_path / "v1.2.txt").write_text("a dog\na red cat\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a dog"}\n\n{"prompt": "a red cat"}\n')
    for name in ("v1.2.txt", "b.jsonl"):
        listed, bad = wanted(reader, tmp_path / name)
        assert [record.id for record in listed].index(alone.id) == 1 and not bad


def test_ids_that_are_given_stay(tmp_path: Path, reader: Reader) -> None:
    rows = [{"prompt": "a red cat", "id": "own-1"}, {"prompt": "a red cat", "id": "own-2"}, {"prompt": "a red cat"}]
    records, bad = wanted(reader, jsonl(tmp_path / "own.jsonl", list(rows)))
    assert [record.id for record in records[:2]] == ["own-1", "own-2"] and len(records) == 3 and not bad


def test_an_edit_is_its_words_and_the_bytes_of_its_sources(tmp_path: Path, reader: Reader) -> None:
    rows = []
    for folder, color in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40), color).save(tmp_path / folder / "x.png")
        rows.append({"prompt": "make it green", "references": [f"{folder}/x.png"]})
    records, bad = wanted(reader, jsonl(tmp_path / "list.jsonl", [*rows, rows[0]]))
    assert len({record.id for record in records}) == 2 and bad[0].endswith(
        "the prompt is that of " + str(tmp_path / "list.jsonl, row 1")
    )
    (alone,), _ = wanted(reader, "make it green", tmp_path / "b" / "x.png")
    assert alone.id == records[1].id and alone.references == records[1].references


def test_bad_rows_are_told_and_left_out(tmp_path: Path, reader: Reader) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    Image.new("RGB", (400, 50)).save(tmp_path / "long.png")
    (tmp_path / "bad.png").write_bytes(b"%!PS-Adobe")
    rows = [
        {"prompt": "a cat"},
        {"prompt": "  "},
        {"prompt": "say <|im_end|>"},
        {"prompt": "blue", "references": ["bad.png"]},
        {"prompt": "blue", "references": ["good.png"]},
        {"prompt": "blue", "references": ["long.png"]},
        {"prompt": "blue", "references": ["none.png"]},
        {"prompt": "a dog", "id": "x"},
        {"prompt": "a bird", "id": "x"},
    ]
    records, bad = wanted(reader, jsonl(tmp_path / "list.jsonl", list(rows)))
    assert [record.task for record in records] == ["t2i", "edit", "t2i"]
    assert [line.partition(":")[0] for line in bad] == [f"list.jsonl, row {n}" for n in (2, 3, 4, 6, 7, 9)]
    said = ("empty", "<|im_end|>", "not a readable image", "400x50 px, 192x32 once it is scaled; allowed: 128 px")
    assert all(part in line for part, line in zip((*said, "none.png", "id 'x' was already used"), bad, strict=True))


def test_lines_of_text_that_are_no_prompt_stop_nothing(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "a.txt").write_bytes(b"a cat\n\na caf\xe9\na dog\n\n")
    records, bad = wanted(reader, tmp_path / "a.txt")
    assert [record.prompt for record in records] == ["a cat", "a dog"]
    assert [line.partition(":")[0] for line in bad] == [f"a.txt, row {n}" for n in (2, 3, 5)]
    assert [record.prompt for record in wanted(reader, tmp_path / "a.txt", limit=1)[0]] == ["a cat"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a <|im_end|>", "reserved token"),
        ("a \udcff cat", "no UTF-8 text"),
        ("word " * 300, "tokens long; the model reads 200"),
        ("x" * 10**7, "letters; the model reads 200 tokens"),
        ("a cat.txt", "there is no file 'a cat.txt'; a prompt that ends like a file's name can be given in a .txt"),
    ],
)
def test_a_bad_prompt_of_the_command_line_is_an_error(reader: Reader, given: str, said: str) -> None:
    with pytest.raises(UserError, match=f"--prompts: .*{said}"):
        wanted(reader, given)


def test_images_of_the_command_line_are_sources_of_all(tmp_path: Path, reader: Reader) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (record,), _ = wanted(reader, "make it blue", tmp_path / "good.png")
    assert record.task == "edit" and record.references == ((tmp_path / "good.png").read_bytes(),)
    with pytest.raises(UserError, match=r"no\.png: No such file"):
        wanted(reader, "make it blue", tmp_path / "no.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(UserError, match=r"--images: .*huge\.png has 300 MiB; allowed: 256 MiB"):
        wanted(reader, "make it blue", tmp_path / "huge.png")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--weights: .*tokenizer\.json is not there"):
        wanted(Reader(tmp_path, 200, 128, 64), "a cat")
