"""Project rules that no linter checks: the direction of imports, and limits on size and imports."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.import_graph import circles, import_graph, longest_chain, merged, module_name, room

# Each package, and the other packages it may import: stages -> actors -> rewards, deepgen.
MAY_IMPORT = {
    "deepgen": set[str](),
    "rewards": {"deepgen"},
    "actors": {"rewards", "deepgen"},
    "stages": {"actors", "rewards", "deepgen"},
    "examples": {"rewards", "deepgen"},
}
PACKAGES = (*MAY_IMPORT, "benchmarks")
# Inside actors, each part may import the parts before it.
ORDER_IN_ACTORS = ("experience", "learner", "objectives", "start", "simulation")
FLOORS, FILES = 4, 14  # limits of a folder: files in the longest chain of imports, files besides __init__.py
FUNCTION_LINES, FILE_LINES = 80, 600
ASSETS_BYTES = 48 * 10**6
# All ways to let Pillow, or a library that uses it, choose a decoder by the bytes.
OPENS_IMAGES = re.compile(
    r"\bImage\.open\(|from PIL\.Image import|ImageFile\.Parser|\b(imread|load_image|read_image|decode_jpeg|imdecode)\("
)
# These files open only pictures that we made ourselves, and name the format.
OPEN_THEIR_OWN = {
    "benchmarks/loader_floor.py",
    "platform/deepgen/tracking/delivery/run_items.py",
    "stages/base/pictures/world.py",
}


def sources(root: Path, package: str) -> list[Path]:
    return sorted((root / ("platform/deepgen" if package == "deepgen" else package)).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in the file."""
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
    """By default Pillow starts Ghostscript for bytes that begin like PostScript, so only one module may open images."""
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


@pytest.fixture(scope="module")
def graph(root: Path) -> dict[str, set[str]]:
    """All modules of the packages, and the modules that each of them imports."""
    files = [file for package in PACKAGES for file in sources(root, package)]
    return import_graph({module_name(file, root): file.read_text(encoding="utf-8") for file in files})


def test_no_two_files_share_a_name(root: Path) -> None:
    wrong = shared_names(file for package in PACKAGES for file in sources(root, package))
    assert not wrong


def shared_names(files: Iterable[Path]) -> list[str]:
    counted = Counter(file.name for file in files)
    return [name for name, count in counted.items() if count > 1 and name not in ("__init__.py", "__main__.py")]


def test_no_circles_of_imports(graph: dict[str, set[str]]) -> None:
    """This covers imports at the top of files, in functions, and for type checkers."""
    wrong = circles(graph)
    assert not wrong


def test_rooms_of_deepgen_go_one_way(graph: dict[str, set[str]]) -> None:
    rooms = merged(graph, lambda name: ".".join(name.split(".")[:2]) if name.startswith("deepgen.") else None)
    wrong = circles(rooms)
    assert not wrong


def test_rooms_are_few_files_on_few_floors(graph: dict[str, set[str]]) -> None:
    wrong = crowded(graph)
    assert not wrong


def crowded(graph: dict[str, set[str]]) -> list[str]:
    """Folders with too many files, or with too long a chain of imports."""
    found = []
    for folder in sorted({name.rpartition(".")[0] for name in graph} - {""}):
        inside = room(graph, folder)
        chain = longest_chain(inside)
        if len(inside) > FILES:
            found.append(f"{folder}: {len(inside)} files; allowed: {FILES}")
        if len(chain) > FLOORS:
            found.append(f"{folder}: {len(chain)} floors; allowed: {FLOORS}: {' → '.join(chain)}")
    return found


def test_actors_go_one_way(graph: dict[str, set[str]]) -> None:
    wrong = upward(graph, "actors", ORDER_IN_ACTORS)
    assert not wrong


def upward(graph: dict[str, set[str]], package: str, order: tuple[str, ...]) -> list[str]:
    """Imports of a later part of the package by an earlier one."""
    place = {f"{package}.{part}": number for number, part in enumerate(order)}

    def place_of(name: str) -> int | None:
        return place.get(".".join(name.split(".")[:2]))

    pairs = [(name, other) for name, wanted in graph.items() for other in sorted(wanted)]
    return [
        f"{name} → {other}"
        for name, other in pairs
        if (here := place_of(name)) is not None and (there := place_of(other)) is not None and here < there
    ]


def test_files_and_functions_can_be_read_in_one_sitting(root: Path) -> None:
    files = [file for package in PACKAGES for file in sources(root, package)]
    wrong = [line for file in files for line in too_long(str(file.relative_to(root)), file.read_text("utf-8"))]
    assert not wrong


def too_long(name: str, source: str) -> list[str]:
    lines = {name: len(source.splitlines())} if len(source.splitlines()) > FILE_LINES else {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            lines |= {f"{name}: {node.name}": length} if length > FUNCTION_LINES else {}
    return [f"{what}: {length} lines" for what, length in lines.items()]


@pytest.mark.parametrize("package", ["platform", "actors", "rewards", "stages"])
def test_text_files_are_utf8_whatever_the_locale_is(root: Path, package: str) -> None:
    files = {str(file): file.read_text(encoding="utf-8") for file in sources(root, package)}
    assert [line for name, source in files.items() for line in without_encoding(name, source)] == []


def without_encoding(name: str, source: str) -> list[str]:
    """Calls that read or write text in the locale's encoding. Of `open`, those with no mode or a mode of text."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        plain_open = isinstance(call.func, ast.Name) and call.func.id == "open" and not _binary(call.args[1:])
        path_open = method == "open" and len(call.args) == 1 and not call.keywords and _text(call.args[0])
        if method in ("read_text", "write_text") or plain_open or path_open:
            found.append(f"{name}:{call.lineno}")
    return found


def _binary(mode: list[ast.expr]) -> bool:
    return bool(mode) and isinstance(mode[0], ast.Constant) and "b" in str(mode[0].value)


def _text(mode: ast.expr) -> bool:
    return isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rwax+t")


def test_a_file_in_the_encoding_of_the_locale_is_found() -> None:
    wrong = "p.read_text()\np.write_text(x)\nopen(p)\nopen(p, 'w')\np.open('a')\n"
    right = "p.read_text('utf-8', encoding='utf-8')\nopen(p, 'rb')\np.open('wb')\ntarfile.open(p)\nx.open()\n"
    assert without_encoding("x", wrong + right) == [f"x:{line}" for line in range(1, 6)]


def test_folders_of_tests_are_those_of_the_source(root: Path) -> None:
    folders = [path.relative_to(root / "tests") for path in (root / "tests").rglob("*") if path.is_dir()]
    tested = [path for path in folders if path.parts[0] not in ("helpers", "golden") and path.name != "__pycache__"]
    assert len(tested) > 10
    homes = (root, root / "platform" / "deepgen", root / "actors")
    wrong = [str(path) for path in tested if not any((home / path).is_dir() for home in homes)]
    assert not wrong


# -- the checks can fail ---------------------------------------------------------------------------------------------


def test_imports_are_found_wherever_they_stand() -> None:
    source = "from a import b\nif TYPE_CHECKING:\n    import a.c\ndef f():\n    from a.d import name\nimport os"
    modules = {"a": "", "a.b": "", "a.c": "", "a.d": "", "a.e": source}
    assert import_graph(modules)["a.e"] == {"a.b", "a.c", "a.d"}


def test_a_circle_is_told_from_a_chain() -> None:
    straight = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    assert circles(straight) == [] and longest_chain(straight) == ["a", "b", "c"]
    bent = straight | {"c": {"d"}, "d": {"b"}}
    assert circles(bent) == ["b → c → d → b"] and longest_chain(bent) == ["a", "b", "c", "d"]
    rooms = merged({"p.x.one": {"p.y.one"}, "p.y.two": {"p.x.two"}, "other": set()}, lambda name: name[:3])
    assert circles(rooms) == ["p.x → p.y → p.x"]


def test_a_crowded_room_is_found() -> None:
    tower = {f"p.m{i}": {f"p.m{i + 1}"} for i in range(FLOORS)} | {f"p.m{FLOORS}": set[str]()}
    assert crowded(tower) == [f"p: 5 floors; allowed: 4: {' → '.join(sorted(tower))}"]
    hall = {f"p.m{i}": set[str]() for i in range(FILES)}
    assert crowded(hall | {"p": set(hall), "p.inner.m": set()}) == []
    assert crowded(hall | {"p.one_more": set()}) == ["p: 15 files; allowed: 14"]


def test_an_import_upward_is_found() -> None:
    graph = {"p.low.a": {"p.high.b", "p.other"}, "p.high.b": {"p.low.a"}, "p.other": {"p.high.b"}}
    assert upward(graph, "p", ("low", "high")) == ["p.low.a → p.high.b"]


def test_long_things_and_shared_names_are_found() -> None:
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES
    assert too_long("x.py", function) == ["x.py: f: 81 lines"]
    assert too_long("x.py", "pass\n" * 601) == ["x.py: 601 lines"] and not too_long("x.py", "pass\n" * 600)
    paths = [Path(name) for name in ("a/b.py", "c/b.py", "a/__init__.py", "c/__init__.py", "a/d.py")]
    assert shared_names(paths) == ["b.py"]


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_assets_stay_small(root: Path) -> None:
    assert sum(file.stat().st_size for file in (root / "assets").rglob("*") if file.is_file()) <= ASSETS_BYTES


def test_what_git_keeps_beside_assets_is_small(root: Path) -> None:
    folders = ("docs", "platform", *(set(MAY_IMPORT) - {"deepgen"}), "tests", "benchmarks", "clusters", "tools")
    files = [file for folder in folders for file in (root / folder).rglob("*") if file.is_file()]
    assert len(files) > 100
    assert not [file.name for file in files if file.stat().st_size > 1_000_000]
