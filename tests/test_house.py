"""Rules of the house that no linter knows: which way imports go, and what must stay light or small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

# Each package and what it may import of the others: stages -> actors -> rewards, deepgen.
MAY_IMPORT = {
    "deepgen": set[str](),
    "rewards": {"deepgen"},
    "actors": {"rewards", "deepgen"},
    "stages": {"actors", "rewards", "deepgen"},
}
ASSETS_BYTES = 48 * 10**6
# Every way to have Pillow, or somebody on top of it, choose a decoder by what the bytes say.
OPENS_IMAGES = re.compile(
    r"\bImage\.open\(|from PIL\.Image import|ImageFile\.Parser|\b(imread|load_image|read_image|decode_jpeg|imdecode)\("
)
# Pictures that we have made ourselves, each opened with its format: shown once more, drawn from SVG, the bare floor.
OPEN_THEIR_OWN = {
    "benchmarks/loader_floor.py",
    "platform/deepgen/tracking/tracker.py",
    "stages/base/world.py",
}


def sources(root: Path, package: str) -> list[Path]:
    return sorted((root / ("platform/deepgen" if package == "deepgen" else package)).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Top-level names of all modules a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(root: Path, package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    found = {str(file.relative_to(root)): imported(file) & forbidden for file in sources(root, package)}
    wrong = {file: names for file, names in found.items() if names}
    assert not wrong


def test_settings_import_neither_torch_nor_ray(root: Path) -> None:
    heavy = {"torch", "ray", "transformers", "diffusers", "vllm"}
    wrong = [file.name for file in (root / "platform/deepgen/config").glob("*.py") if imported(file) & heavy]
    assert not wrong


def test_rewards_know_nothing_of_ray(root: Path) -> None:
    assert not [file.name for file in sources(root, "rewards") if "ray" in imported(file)]


def test_images_are_opened_in_one_place(root: Path) -> None:
    """Pillow starts Ghostscript for bytes that begin like PostScript: ``deepgen.data.images`` names the formats."""
    files = [file for package in (*MAY_IMPORT, "benchmarks", "tools") for file in sources(root, package)]
    lines = {
        (str(file.relative_to(root)), line.strip())
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if OPENS_IMAGES.search(line)
    }
    assert ("platform/deepgen/data/images.py", "return Image.open(io.BytesIO(data), formats=FORMATS)") in lines
    assert {file for file, _ in lines} <= {"platform/deepgen/data/images.py", *OPEN_THEIR_OWN}
    assert all("formats=" in line for _, line in lines)


def test_files_can_be_read_in_one_sitting(root: Path) -> None:
    long = {
        str(file.relative_to(root)): lines
        for package in MAY_IMPORT
        for file in sources(root, package)
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long


def test_assets_stay_small(root: Path) -> None:
    assert sum(file.stat().st_size for file in (root / "assets").rglob("*") if file.is_file()) <= ASSETS_BYTES


def test_what_git_keeps_beside_assets_is_small(root: Path) -> None:
    folders = ("docs", "tests", "stages", "actors", "rewards", "platform", "benchmarks", "clusters", "tools")
    files = [file for folder in folders for file in (root / folder).rglob("*") if file.is_file()]
    assert len(files) > 100
    assert not [file.name for file in files if file.stat().st_size > 1_000_000]
