"""What the start of an rl run says about its prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.experience.reward_requests import make_requests, reward_weights
from deepgen.config import Settings, UserError, load_settings
from stages.rl_prompts import about_applying, about_lengths, about_prompts, about_rows, read_prompts
from tests.data.test_records import GOOD


def lines_about(folder: Path, *prompts: str) -> list[str]:
    (folder / "mine.txt").write_text("\n".join(prompts), encoding="utf-8")
    own = [f"run.dir={folder / 'runs'}", f"data.prompts={folder / 'mine.txt'}", f"model.weights={folder}"]
    return about_prompts(read_prompts(load_settings(None, own)))


def test_it_says_how_many_prompts_each_task_has_and_one_target(tmp_path: Path) -> None:
    assert lines_about(tmp_path, "a cat", 'a 19" rack', 'a menu that says “Menu” and "Today"', "a “b”") == [
        "prompts: 2 t2i, 2 text",
        "words to draw, for example: 'Menu' and 'Today' in 'a menu that says “Menu” and \"Today\"'",
    ]
    assert lines_about(tmp_path, "a cat", "a dog") == ["prompts: 2 t2i"]
    long = lines_about(tmp_path, f'"HI" on {"a very " * 50}large sign')[1]
    assert len(long) < 180 and long.startswith("words to draw, for example: 'HI' in '\"HI\" on a very") and "…" in long


def test_it_says_which_prompts_a_reward_cannot_score(tmp_path: Path) -> None:
    found = [
        ((f"{task}.txt", row), replace(GOOD, task=task, prompt=prompt, references=(b"",) * (task == "edit")))
        for task, prompts in {
            "text": ['a sign "NO"', 'a 19" rack', "a sign"],
            "edit": ["write “YES”", "make it red"],
            "t2i": ["a cat"],
        }.items()
        for row, prompt in enumerate(prompts)
    ]
    own = ["rewards.letters.class=ocr", "rewards.weights.edit={letters: 1, kept: 0.1}", "rewards.weights.text.kept=1"]
    settings = load_settings(None, [f"run.dir={tmp_path}", *own])
    assert list(about_applying(settings, found)) == [
        "2 of 3 text prompts get no score from rewards.ocr, which does not apply to them: they quote no words to draw; "
        "first text.txt, row 1",
        "3 of 3 text prompts get no score from rewards.kept, which does not apply to them; first text.txt, row 0",
        "1 of 2 edit prompts get no score from rewards.letters, which does not apply to them: they quote no words to "
        "draw; first edit.txt, row 1",
    ]


def test_it_says_how_many_prompts_are_longer_than_a_model_reads(root: Path, tmp_path: Path) -> None:
    settings = load_settings(root / "stages" / "recipes" / "tiny-rl.yaml", [f"run.dir={tmp_path}"])
    short = [replace(GOOD, id=str(i)) for i in range(3)]
    sentences = replace(GOOD, answer="a cat on a mat, " * 20)  # 120 words
    letters = replace(GOOD, task="reasoning", prompt="一只猫在垫子上" * 430, answer="")
    quoted = replace(GOOD, task="text", answer="a cat on a mat, " * 200)
    assert list(about_lengths(settings, short)) == []
    assert list(about_lengths(settings, [*short, sentences, letters, quoted])) == [
        "1 of 6 prompts are too long for the policy: it does not read their beginning (more than 1,024 tokens)",
        "2 of 6 prompts are too long for rewards.judge: it scores none of their images (more than 512 tokens)",
        "3 of 6 prompts are too long for rewards.clip: it does not read their end (more than 40 tokens)",
    ]
    few = load_settings(
        root / "stages" / "recipes" / "tiny-rl.yaml", [f"run.dir={tmp_path}", "rewards.weights.text={}"]
    )
    assert list(about_lengths(few, [short[0], quoted])) == []  # no reward looks at it


def test_weights_of_a_data_set_come_before_those_of_the_task(tmp_path: Path) -> None:
    rows = [{"prompt": f"a cat {i}", "source": "cats"} for i in range(3)] + ["a dog", 'the word "hi"']
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")

    def settings_with(*weights: str) -> Settings:
        own = [f"run.dir={tmp_path / 'runs'}", f"data.prompts={tmp_path / 'mine.json'}", f"model.weights={tmp_path}"]
        return load_settings(None, [*own, *weights])

    settings = settings_with("rewards.weights.source:cats={aesthetic: 1, clip: [0, 2, 10]}")
    found = read_prompts(settings)
    assert about_rows(settings, found) == ["rewards.weights: 1 by t2i, 1 by text, 3 by source:cats"]
    assert about_rows(settings_with(), found) == []
    cat, dog = found[0][1], found[3][1]
    (asked,) = make_requests(cat, [np.zeros((8, 8, 3), np.uint8)])
    assert settings.rewards.used() == ("judge", "ocr", "clip", "aesthetic")
    by_step = [reward_weights(settings.rewards, cat, asked, step).tolist() for step in (0, 5, 10, None)]
    assert by_step == [[0, 0, clip, 1] for clip in (0, 1, 2, 2)]  # 0 is not asked yet
    (asked,) = make_requests(dog, [np.zeros((8, 8, 3), np.uint8)])
    assert reward_weights(settings.rewards, dog, asked, 0).tolist() == pytest.approx([0.7, 0, 0.3, 0])

    with pytest.raises(
        UserError, match=r"weights\.source:cat: no prompt of data\.prompts has the source 'cat'; .*'cats'"
    ):
        read_prompts(settings_with("rewards.weights.source:cat={aesthetic: 1}"))
    with pytest.raises(UserError, match=r"mine\.json, row 1: source:cats has no weight above 0 in rewards\.weights"):
        read_prompts(settings_with("rewards.weights.source:cats={}"))
