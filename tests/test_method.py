"""docs/method.md has every section that a comment cites."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("platform/deepgen", "actors", "rewards", "stages", "benchmarks", "tests", "tools", "docs", "clusters")
SUFFIXES = (".py", ".yaml", ".md")
PAGE = "docs/method.md"
FEWEST = 60  # least number of citations; fewer mean that the search looks in the wrong place
# M1, M1.5, M1.2-1.5, M3.8a, M3.8 a (no article: a mark or the line's end follows), method 2, method 3.7
CITATION = re.compile(
    r"\b(?:M|method\s+M?)(?P<chapter>\d)"
    r"(?:\.(?P<section>\d+)(?:[-–]M?(?P=chapter)\.(?P<last>\d+)|(?P<letter>[a-z]|\s[a-z](?=[),.;:]|$)))?)?"
    r"(?!\.?\w)",  # M60, M1x and 3.2.1 are something else
    re.MULTILINE,
)
HEADING = re.compile(r"^#{2,4} M(\d(?:\.\d+)?[a-z]?)\b", re.MULTILINE)


def citations(text: str) -> Iterator[tuple[int, str, str]]:
    """Line (from 1), words and section ("1", "1.5" or "3.8a") of every citation. A range gives each of its sections."""
    for match in CITATION.finditer(text):
        line, chapter, section = text.count("\n", 0, match.start()) + 1, match["chapter"], match["section"]
        if section is None:
            yield line, match[0], chapter
            continue
        letter = (match["letter"] or "").strip()
        for number in range(int(section), int(match["last"] or section) + 1):
            yield line, match[0], f"{chapter}.{number}{letter}"


def unknown(place: str, text: str, sections: set[str]) -> list[str]:
    """The text's citations of sections that do not exist."""
    return [
        f"{place}:{line}: {words!r}, but {PAGE} has no heading M{section}"
        for line, words, section in citations(text)
        if section not in sections
    ]


def citing_files(root: Path) -> list[Path]:
    found = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*")) if file.suffix in SUFFIXES]
    found = [file for file in found if file not in (root / PAGE, root / "tests" / "test_method.py")]
    return [root / "README.md", root / "Makefile", *found]


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_every_section_that_is_cited_is_there(root: Path) -> None:
    sections = set(HEADING.findall(read(root / PAGE)))
    texts = {str(file.relative_to(root)): read(file) for file in citing_files(root)}
    assert sum(len(list(citations(text))) for text in texts.values()) >= FEWEST
    wrong = [line for place, text in texts.items() for line in unknown(place, text, sections)]
    assert not wrong, "\n".join(wrong)


def test_the_page_keeps_to_its_own_sections(root: Path) -> None:
    page = read(root / PAGE)
    headings = HEADING.findall(page)
    assert len(headings) == len(set(headings))
    assert not unknown(PAGE, page, set(headings))


def test_a_citation_of_nothing_is_reported() -> None:
    """All forms of a citation are recognised, and text that only looks like one is ignored."""
    cited, n = "one (M1)\ntwo: M1.2-1.4, M3.8 a) and M3.8b\nmethod 3.7 of method 2, M3.8 a pair", 9
    assert [section for _, _, section in citations(cited)] == [
        *("1", "1.2", "1.3", "1.4", "3.8a", "3.8b"),
        *("3.7", "2", "3.8"),
    ]
    assert not list(citations("SD3.5M, 5M, Qwen2.5-VL, Tesla M60, M1x, M3.2.1 and its method 30"))
    assert unknown("a.py", f"fine (M3.8 a)\n# as M{n}.4 says, M3.8 c)", {"3.8a", "3.8"}) == [
        f"a.py:2: 'M{n}.4', but docs/method.md has no heading M{n}.4",
        "a.py:2: 'M3.8 c', but docs/method.md has no heading M3.8c",
    ]


# -- the names on "Code:" lines --------------------------------------------------------------------------------------

CODE = re.compile(r"Code:(.*?)(?:\n\n|\n#|\n```|\Z)", re.DOTALL)
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)`")


def named_code(page: str) -> set[str]:
    """Functions, classes and constants that the page gives as the code of a section: "name" or "Class.name"."""
    return {name for listed in CODE.findall(page) for name in NAME.findall(listed)}


def not_defined(name: str, source: str) -> bool:
    """Whether some part of a dotted name is not defined: it is no function, class or assigned name in the source."""
    return any(
        not re.search(rf"^ *(?:(?:async )?def|class) {part}\b|^ *{part}(?:: .*)? = ", source, re.MULTILINE)
        for part in name.split(".")
    )


def test_code_that_the_page_names_exists(root: Path) -> None:
    code = [root / folder for folder in ("platform/deepgen", "actors", "rewards", "stages")]
    source = "\n".join(read(file) for folder in code for file in sorted(folder.rglob("*.py")))
    found = named_code(read(root / PAGE))
    assert len(found) >= FEWEST
    assert not [name for name in sorted(found) if not_defined(name, source)]
    assert not_defined("no_such_function", source) and not_defined("UnifiedModel.nothing", source)
