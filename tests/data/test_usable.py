"""Unusable prompts and held-out records are left out before anything starts, by the rule for training data."""

from __future__ import annotations

import json
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


def test_a_list_of_bad_rows_that_is_cut_is_made_again(tmp_path: Path, weights: Path) -> None:
    """Else the row of a line that a crash has cut would be used."""
    write_records(tmp_path / "x.parquet", [*prompts(5), *(record for record, _ in BAD)])
    run = settings(tmp_path, weights, "data.max_bad_share=1")
    usable, path = usable_records(run, "data.prompts"), tmp_path / "runs/a/quarantine-prompts.jsonl"
    whole = path.read_bytes()
    for kept in (whole[:-40], whole[: len(whole) // 2] + b"\n", b"\0" * 90):
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
