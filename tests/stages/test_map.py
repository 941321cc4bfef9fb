"""The map of the RL loop: the same in all three places, and every name on it exists."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

PLACES = ("stages/rl.py", "README.md", "docs/architecture.md")
LINE = re.compile(r"([\w/]+\.py): ([\w.]+(?:, [\w.]+)*)")


def map_of(text: str) -> str:
    """The lines from "generate" to the end of the map."""
    found = re.search(r"^ *generate   .*?(?=\n```|\n\nHeld-out)", text, re.DOTALL | re.MULTILINE)
    assert found, "no map"
    return textwrap.dedent(found[0]).strip()


def names(text: str) -> list[tuple[str, str]]:
    """(file, dotted name) of everything on a map."""
    return [(file, name) for file, listed in LINE.findall(text) for name in listed.split(", ")]


def defined(source: str) -> set[str]:
    """Functions and classes at the top of a file, and the methods of these classes as Class.method."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def test_the_map_is_the_same_everywhere(root: Path) -> None:
    maps = [map_of((root / place).read_text()) for place in PLACES]
    assert maps[0] == maps[1] == maps[2]


def test_every_name_on_the_map_exists(root: Path) -> None:
    found = names(map_of((root / PLACES[0]).read_text()))
    assert len(found) >= 12
    missing = [f"{file}: {name}" for file, name in found if name not in defined((root / file).read_text())]
    assert not missing
    steps = re.findall(r"^(\w+) {2,}", map_of((root / PLACES[0]).read_text()), re.MULTILINE)
    assert steps == ["generate", "score", "advantage", "update", "sync"]


@pytest.mark.parametrize("name", ["sample_it", "RolloutActor.nothing", "nothing.at.all"])
def test_a_name_that_is_gone_would_be_found(root: Path, name: str) -> None:
    ((file, found),) = names(f"generate   actors/experience/rollout_actor.py: {name}")
    assert found == name and found not in defined((root / file).read_text())
