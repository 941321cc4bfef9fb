"""The graph of imports between modules, including imports inside functions, and checks on it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

Graph = Mapping[str, set[str]]


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] == "platform" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """For each of the given modules (name -> source), the given modules it imports, also in functions and for types."""
    graph = {name: set[str]() for name in sources}
    for name, source in sources.items():
        for wanted in _imports(source):
            found = _longest_known(wanted, sources)
            if found and found != name:
                graph[name].add(found)
    return graph


def _imports(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _longest_known(name: str, known: Mapping[str, str]) -> str | None:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def merged(graph: Graph, part_of: Callable[[str], str | None]) -> dict[str, set[str]]:
    """The graph between parts, from the graph between modules. Modules without a part are left out."""
    parts = {part: set[str]() for name in graph if (part := part_of(name))}
    for name, wanted in graph.items():
        part = part_of(name)
        if part:
            parts[part] |= {other for one in wanted if (other := part_of(one)) and other != part}
    return parts


def circles(graph: Graph) -> list[str]:
    """A circle, "a → b → a", for each connected group of circles: the shortest one through the group's first module."""
    found, seen = [], set[str]()
    for name in sorted(graph):
        path = None if name in seen else _shortest_way_back(graph, name)
        if path:
            found.append(" → ".join(path))
            seen |= {other for other in _reached(graph, name) if name in _reached(graph, other)}
    return found


def _shortest_way_back(graph: Graph, start: str) -> list[str] | None:
    paths, seen = [[start]], set[str]()
    for path in paths:  # the list grows in the loop: breadth-first search
        for wanted in sorted(graph.get(path[-1], ())):
            if wanted == start:
                return [*path, start]
            if wanted not in seen:
                seen.add(wanted)
                paths.append([*path, wanted])
    return None


def _reached(graph: Graph, start: str) -> set[str]:
    reached, open_ = set[str](), [start]
    while open_:
        new = graph.get(open_.pop(), set()) - reached
        reached |= new
        open_ += new
    return reached


def longest_chain(graph: Graph) -> list[str]:
    """The longest chain of imports. Each module appears once, even if there are circles."""

    @cache
    def below(name: str, above: frozenset[str]) -> tuple[str, ...]:
        chains = [below(other, above | {other}) for other in sorted(graph.get(name, set()) - above)]
        return (name, *(max(chains, key=len) if chains else ()))

    chains: list[tuple[str, ...]] = [below(name, frozenset({name})) for name in sorted(graph)]
    longest = max(chains, key=len, default=())
    return list(longest)


def room(graph: Graph, folder: str) -> dict[str, set[str]]:
    """The modules directly in a folder, without its __init__, and the imports between them."""
    inside = {name for name in graph if name.rpartition(".")[0] == folder}
    inside -= {name for name in inside if any(other.startswith(f"{name}.") for other in graph)}  # without subfolders
    return {name: graph[name] & inside for name in inside}
