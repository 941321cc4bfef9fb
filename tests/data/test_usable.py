"""Unusable prompts and held-out records are left out before anything starts, by the rule for training data."""

from __future__ import annotations

import base64
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepgen.config import Settings, UserError, load_settings
from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from deepgen.data.usable import left_out, usable_records
from deepgen.evaluation.choose import heldout_records
from stages.rl_prompts import read_prompts
from tests.data.test_records import EDIT, GOOD, PICTURE
from tests.helpers.factories import make_tokenizer
from tests.objectives.test_bad_records import strip

PROMPT = replace(GOOD, image=None)
BAD: list[tuple[Any, str]] = [
    (replace(PROMPT, id="b0", prompt="  "), "prompt is empty"),
    (replace(PROMPT, id="b1", prompt=None), "prompt is null; allowed: text"),  # type: ignore[arg-type]
    (replace(PROMPT, id="b2", task="video"), "task 'video'; allowed: t2i"),
    (replace(PROMPT, id="p3"), "id 'p3' was already used in"),
    (replace(PROMPT, id="b4", prompt="a <|im_end|> b"), "prompt contains the reserved token <|im_end|>"),
    (replace(EDIT, id="b5", image=None, references=(PICTURE, PICTURE[:40])), "reference 2 is not a readable image"),
    (replace(EDIT, id="b6", image=None, references=(strip(90, 10),)), "reference 1 is 90x10 px; allowed: sides in a"),
    (replace(PROMPT, id="b7", answer="a <|image_pad|>"), "answer contains the reserved token <|image_pad|>; remove it"),
    (replace(PROMPT, id="b8", answer="a <verdict> b"), "answer contains the reserved token <verdict>; remove it"),
    (replace(PROMPT, id="b9", prompt="a <verdict> b"), "prompt contains the reserved token <verdict>; remove it"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's tokenizer, and a judge's with a special token of its own and one that is a common letter."""
    folder = tmp_path_factory.mktemp("weights")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "judge").mkdir()
    added = [{"content": token, "special": True} for token in ("<verdict>", "!")]
    (folder / "judge" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return folder


def settings(folder: Path, weights: Path, *more: str) -> Settings:
    own = [f"run.dir={folder / 'runs'}", "run.name=a", f"model.weights={weights}"]
    own += [f"rewards.judge.path={weights / 'judge'}"]
    own += [f"data.{name}={folder / 'x.parquet'}" for name in ("prompts", "heldout")]
    return load_settings(None, [*own, *more])


def prompts(count: int) -> list[Record]:
    return [replace(PROMPT, id=f"p{i}", prompt=f"a thing {i}!") for i in range(count)]


def test_bad_rows_are_left_out_with_their_reasons(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / "x.parquet", [*prompts(5), *(record for record, _ in BAD), EDIT])
    run = settings(tmp_path, weights, "data.max_bad_share=1")
    usable = [record for _, record in usable_records(run, "data.prompts")]
    assert [record.id for record in usable] == ["p0", "p1", "p2", "p3", "p4", "b"]
    lines = [json.loads(line) for line in (tmp_path / "runs/a/quarantine-prompts.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in lines] == [(6 + i, record.id) for i, (record, _) in enumerate(BAD)]
    assert all(reason in line["reason"] for line, (_, reason) in zip(lines, BAD, strict=True))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "x.parquet, row 6 is left out (prompt is empty)" in said
    assert left_out(run, "data.prompts", "data.heldout") == {"data/quarantined_prompts": len(BAD)}

    monkeypatch.setattr("deepgen.data.usable.usable_image", lambda *_: pytest.fail("judged before"))
    assert [record for _, record in usable_records(run, "data.prompts")] == usable


@pytest.mark.parametrize("form", ["file", "folder"])
def test_another_checkout_of_the_same_data_is_not_judged_again(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """In a submitted job every node has its own copy of the data, with another path and other file times."""
    found = []
    for node in ("one", "two"):
        path = tmp_path / node / "data" / "x.parquet"
        write_records(path, [*prompts(5), *(record for record, _ in BAD), EDIT])
        os.utime(path, (1, 1 if node == "one" else 2))
        given = path if form == "file" else path.parent
        run = settings(tmp_path, weights, "data.max_bad_share=1", f"data.prompts={given}")
        found.append([record for _, record in usable_records(run, "data.prompts")])
        monkeypatch.setattr("deepgen.data.usable.usable_image", lambda *_: pytest.fail("judged again"))
    assert found[0] == found[1]
    lines = [json.loads(line) for line in (tmp_path / "runs/a/quarantine-prompts.jsonl").read_text().splitlines()]
    assert {line["file"] for line in lines} == {"x.parquet"} and len(lines) == len(BAD)


def test_data_that_changed_in_place_is_judged_again(tmp_path: Path, weights: Path) -> None:
    write_records(tmp_path / "x.parquet", [*prompts(2), replace(PROMPT, id="b", prompt="a <|im_end|>")])
    assert len(usable_records(settings(tmp_path, weights), "data.prompts")) == 2
    write_records(tmp_path / "x.parquet", [*prompts(2), replace(PROMPT, id="b", prompt="a <|im_edn|>")])
    os.utime(tmp_path / "x.parquet", (1, 1))
    assert len(usable_records(settings(tmp_path, weights), "data.prompts")) == 3


def test_prompts_name_no_file_outside_of_their_folder(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(PICTURE)
    edit = replace(EDIT, id="e", image=None, references=(str(tmp_path / "elsewhere" / "a.png"),))
    (tmp_path / "set").mkdir()
    write_records(tmp_path / "set" / "a.parquet", prompts(2))
    write_records(tmp_path / "set" / "b.parquet", [edit])
    own = f"data.prompts={tmp_path / 'set'}"
    assert len(usable_records(settings(tmp_path, weights, own), "data.prompts")) == 2
    (line,) = map(json.loads, (tmp_path / "runs/a/quarantine-prompts.jsonl").read_text().splitlines())
    assert (
        f"lies outside of {tmp_path / 'set'}; allowed: files in there, or in a folder of data.allow" in line["reason"]
    )
    allow = f"data.allow=[{tmp_path / 'elsewhere'}]"
    assert len(usable_records(settings(tmp_path, weights, own, allow), "data.prompts")) == 3


def test_no_secret_of_an_address_is_in_the_quarantine(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "http://user:hunter2@127.0.0.1:9/a.png?sig=hunter2"
    write_records(tmp_path / "x.parquet", [*prompts(1), replace(EDIT, id=address, image=None, references=(address,))])
    usable_records(settings(tmp_path, weights), "data.prompts")
    written = [file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert len(written) == 2 and not any(b"hunter2" in data for data in written)
    assert "user:***@127.0.0.1:9/a.png?sig=***" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv"])
def test_lists_of_prompts_follow_the_rules_of_parquet(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """What they name stays in their folder, secrets are hidden, and they are judged again when they change."""
    (tmp_path / "set").mkdir()
    for place in (tmp_path / "set" / "a.png", tmp_path / "private.png"):
        place.write_bytes(PICTURE)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "private.png")
    inline = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    secret = "http://user:hunter2@127.0.0.1:9/a.png?sig=hunter2"
    names = ["a.png", f"file://{tmp_path}/set/a.png", inline, "../private.png", str(tmp_path / "private.png")]
    names += ["link.png", "/etc/passwd", secret]
    path = tmp_path / "set" / f"x.{kind}"
    write_list(path, names)
    own = [f"data.prompts={path}", "data.max_bad_share=1"]
    run = settings(tmp_path, weights, *own)
    usable = usable_records(run, "data.prompts")
    assert [record.id for _, record in usable] == ["x-1", "x-2", "x-3"]
    text = (tmp_path / "runs/a/quarantine-prompts.jsonl").read_text()
    reasons = [json.loads(line)["reason"] for line in text.splitlines()]
    assert [f"lies outside of {tmp_path / 'set'}" in reason for reason in reasons] == [True] * 4 + [False]
    assert "http://user:***@127.0.0.1:9/a.png?sig=***: leads to '127.0.0.1'" in reasons[-1]
    assert "hunter2" not in text + capsys.readouterr().out
    os.utime(path, (1, 1))
    assert usable_records(run, "data.prompts") == usable
    write_list(path, names[::-1])
    assert [record.id for _, record in usable_records(run, "data.prompts")] == ["x-6", "x-7", "x-8"]
    allowed = settings(tmp_path, weights, *own, f"data.allow=[{tmp_path}]")
    assert [record.id for _, record in usable_records(allowed, "data.prompts")] == [f"x-{i}" for i in range(3, 9)]


def write_list(path: Path, names: list[str]) -> None:
    """Edits, each with one source image."""
    rows = [{"prompt": "p", "references": [name]} for name in names]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".json":
        text = json.dumps(rows)
    elif path.suffix == ".csv":
        text = "prompt,references\n" + "".join(f'p,"{name}"\n' for name in names)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_a_list_of_bad_rows_that_is_cut_is_made_again(tmp_path: Path, weights: Path) -> None:
    """Else the row of a line that a crash has cut would be used."""
    write_records(tmp_path / "x.parquet", [*prompts(5), *(record for record, _ in BAD)])
    run = settings(tmp_path, weights, "data.max_bad_share=1")
    usable, path = usable_records(run, "data.prompts"), tmp_path / "runs/a/quarantine-prompts.jsonl"
    whole = path.read_bytes()
    for kept in (whole[:-40], whole[: len(whole) // 2] + b"\n", b"\0" * 90, whole + b'{"file": 3, "row": "x"}\n'):
        path.write_bytes(kept)
        assert usable_records(run, "data.prompts") == usable
        assert path.read_bytes() == whole


def test_the_share_is_that_of_training_data(tmp_path: Path, weights: Path) -> None:
    """One bad prompt of a few does not stop a run, unless the allowed share is 0; more than 1 % of many does."""
    bad = replace(PROMPT, id="bad", prompt=" ")
    write_records(tmp_path / "x.parquet", [*prompts(9), bad])
    assert len(usable_records(settings(tmp_path, weights), "data.prompts")) == 9
    with pytest.raises(UserError, match=r"data\.prompts: 10\.0% of 10 records read cannot be used; allowed: 0\.0%"):
        usable_records(settings(tmp_path, weights, "data.max_bad_share=0"), "data.prompts")
    write_records(tmp_path / "x.parquet", [*prompts(300), *(replace(bad, id=f"bad{i}") for i in range(6))])
    with pytest.raises(UserError, match=r"data\.prompts: 2\.0% of 306 records .*quarantine-prompts\.jsonl lists them"):
        usable_records(settings(tmp_path, weights), "data.prompts")
    write_records(tmp_path / "x.parquet", [bad])
    with pytest.raises(UserError, match=r"data\.prompts: no record of .*x\.parquet can be used; see "):
        usable_records(settings(tmp_path, weights), "data.prompts")


def test_a_prompt_list_with_an_empty_line_is_refused(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "x.txt").write_text("a cat\n\na dog\n")
    with pytest.raises(UserError, match=r"x\.txt, row 2: empty line; allowed: one prompt a line"):
        usable_records(settings(tmp_path, weights, f"data.prompts={tmp_path / 'x.txt'}"), "data.prompts")


def test_a_line_of_a_prompt_list_is_refused_like_a_record(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "x.txt").write_text("a cat\na cat<|im_end|>\na dog\n")
    run = settings(tmp_path, weights, f"data.prompts={tmp_path / 'x.txt'}")
    assert [record.prompt for _, record in usable_records(run, "data.prompts")] == ["a cat", "a dog"]
    (line,) = map(json.loads, (tmp_path / "runs/a/quarantine-prompts.jsonl").read_text().splitlines())
    assert (line["row"], line["reason"]) == (2, "prompt contains the reserved token <|im_end|>; remove it")


def test_records_are_judged_again_when_another_judge_reads_them(tmp_path: Path, weights: Path) -> None:
    write_records(tmp_path / "x.parquet", [*prompts(2), BAD[-1][0]])
    assert len(usable_records(settings(tmp_path, weights), "data.prompts")) == 2
    other = settings(tmp_path, weights, f"rewards.judge.path={tmp_path}")  # no tokenizer there
    assert len(usable_records(other, "data.prompts")) == 3
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        usable_records(other, "data.prompts")


def test_a_task_without_reward_is_named_by_its_row(tmp_path: Path, weights: Path) -> None:
    write_records(tmp_path / "x.parquet", [prompts(1)[0], BAD[0][0], replace(EDIT, image=None)])
    run = settings(tmp_path, weights, "rewards.weights.edit={}")
    with pytest.raises(UserError, match=r"x\.parquet, row 3: task edit has no weight above 0 in rewards\.weights"):
        read_prompts(run)


def test_a_reserved_token_in_the_negative_prompt_is_refused(tmp_path: Path, weights: Path) -> None:
    write_records(tmp_path / "x.parquet", prompts(2))
    for negative in ("blurry", "blurry <|im_end|>"):
        run = settings(tmp_path, weights, f"evaluation.negative_prompt={negative}")
        if negative == "blurry":
            assert len(heldout_records(run)) == 2
            continue
        with pytest.raises(UserError, match=r"evaluation\.negative_prompt: got 'blurry <.*reserved token <\|im_end\|>"):
            heldout_records(run)


def test_held_out_records_are_chosen_first_and_not_replaced(tmp_path: Path, weights: Path) -> None:
    records = [*prompts(20), *(replace(BAD[5][0], id=f"e{i}") for i in range(2))]
    write_records(tmp_path / "x.parquet", records)
    run = settings(tmp_path, weights, "evaluation.prompts=6")
    found = heldout_records(run)
    assert len(found) == 4 and all(record.task == "t2i" for record in found)
    assert heldout_records(run) == found
    assert left_out(run, "data.heldout") == {"data/quarantined_heldout": 2}
