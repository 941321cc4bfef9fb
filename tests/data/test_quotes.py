"""Words to draw: what a person would take for them, among quotes, inch marks, apostrophes and titles."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepgen.data.parquet import read_records
from deepgen.data.quotes import quoted_words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a sign "NO" and "GO ON"', ["NO", "GO ON"]),
        ("a menu that says “Menu”", ["Menu"]),
        ("a door with ‘Don’t Walk’ on it", ["Don’t Walk"]),
        ("a shop called 'Joe's'", ["Joe's"]),
        ("牌子上写着「你好」", ["你好"]),
        ('牌子上写着"你好"的照片，旁边是“再见”', ["你好", "再见"]),
        ("看板に『営業中』、横に｢準備中｣", ["営業中", "準備中"]),
        ("ein Schild „Bäckerei“, daneben »Café«", ["Bäckerei", "Café"]),
        ("une enseigne « Boulangerie »", ["Boulangerie"]),
        ("en skylt med ”Meny”", ["Meny"]),
        ('the word "Hello," in neon, and " NO "', ["Hello", "NO"]),
        ('it says"OPEN"', ["OPEN"]),
    ],
)
def test_all_common_quotes_mark_words_to_draw(prompt: str, words: list[str]) -> None:
    assert quoted_words(prompt) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a 19" rack next to a 24" monitor', []),
        ('a 19 " rack next to a 24 " monitor', []),
        ("a 19” rack next to a 24” monitor", []),
        ("a 19'' rack next to a 24'' monitor", []),
        ('a 5\'10" man beside a 6½" ruler', []),
        ('a 19" rack with the sign "OPEN" and a 24" TV', ["OPEN"]),
        ('the sign "ROOM 19" next to a 24" monitor', ["ROOM 19"]),
        ('the number "24" on a door', ["24"]),
    ],
)
def test_inches_are_no_quotes(prompt: str, words: list[str]) -> None:
    assert quoted_words(prompt) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("it's the dogs' bowl and the cats' toy", []),
        ("it’s the dogs’ bowl and the cats’ toy", []),
        ("a rock 'n' roll band", []),
        ("the '90s, with a sign 'SALE'", ["SALE"]),
        ('an open " quote', []),
        ('a "" b and " "', []),
    ],
)
def test_apostrophes_and_stray_marks_are_no_quotes(prompt: str, words: list[str]) -> None:
    assert quoted_words(prompt) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a still from "Alien"', []),
        ('rain, in the style of the "Blade Runner"', []),
        ("a hall that shows the movie called “Jaws”", []),
        ('a "Blade Runner" style city, a "Star Wars"-like ship', []),
        ("电影「千と千尋の神隠し」のポスター", []),
        ('a poster for the film "Jaws" that says "Soon"', ["Soon"]),
        ('a movie poster with the title "JAWS"', ["JAWS"]),
        ('a book titled "The Sea"', ["The Sea"]),
    ],
)
def test_titles_of_works_are_not_drawn(prompt: str, words: list[str]) -> None:
    assert quoted_words(prompt) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('"a cat on a mat"', []),
        ("“a cat on a mat.” ", []),
        ("'a cat on a mat'.", []),
        ("\"a sign that says 'OPEN'\"", ["OPEN"]),
        ('"a sign that says ""OPEN"""', ["OPEN"]),  # as CSV writes it
        ("“a sign that says “OPEN””", ["OPEN"]),
        ("「猫が『営業中』の看板を持つ」", ["営業中"]),
        ('"HELLO" and "WORLD"', ["HELLO", "WORLD"]),
        ('the word "HI".', ["HI"]),
    ],
)
def test_a_prompt_in_quotes_as_a_whole_is_a_prompt(prompt: str, words: list[str]) -> None:
    assert quoted_words(prompt) == words


def test_thousands_of_marks_take_no_time() -> None:
    assert quoted_words("“" * 3000) == [] and len(quoted_words('a "b" ' * 3000)) == 3000


def test_in_the_tiny_world_exactly_the_text_prompts_have_words_to_draw(root: Path) -> None:
    records = read_records(root / "assets" / "tiny" / "data" / "rl_prompts.parquet")
    assert len(records) > 1000
    assert not [record.prompt for record in records if bool(quoted_words(record.prompt)) != (record.task == "text")]
