"""What the start of an rl run says about its prompts."""

from __future__ import annotations

from pathlib import Path

from deepgen.config import load_settings
from stages.rl_prompts import about_prompts, read_prompts


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
