"""Whether a cluster has room for the processes of a run, node by node, before anything starts.

Processes are put on nodes one by one, the largest first, each where it leaves the least. Sums would not do: four nodes
with half a GPU left have no place for a process that needs one. Resources that other programs hold count as free, as
they may end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepgen.cluster.resources import Need

_SLACK = 1e-6  # of sums of shares


@dataclass(frozen=True)
class Node:
    """A node of the cluster. resources: as Ray names them."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


def cluster_nodes() -> list[Node]:
    """The nodes that the connected Ray cluster has now."""
    import ray

    return [Node(node["Resources"], node["Labels"] or {}, node["NodeName"]) for node in ray.nodes() if node["Alive"]]


def unplaced(needs: Sequence[Need], nodes: Sequence[Node]) -> dict[int, int]:
    """How many processes of which need (its place in `needs`) find no room on the nodes."""
    free = [dict(node.resources) for node in nodes]
    left: dict[int, int] = {}
    for place in sorted(range(len(needs)), key=lambda place: _size(needs[place].per_process), reverse=True):
        need = needs[place]
        suitable = [one for one, node in zip(free, nodes, strict=True) if fits_labels(need.labels, node.labels)]
        for done in range(need.count):
            rooms = [one for one in suitable if _fits(need.per_process, one)]
            if not rooms:
                left[place] = need.count - done
                break
            room = min(rooms, key=_size)
            for key, amount in need.per_process.items():
                room[key] -= amount
    return left


def no_room(needs: Sequence[Need], nodes: Sequence[Node], *, grows: bool) -> tuple[str, str]:
    """The error of a run for which there will never be room, and a table. grows: the autoscaler was asked in vain."""
    left = unplaced(needs, nodes)
    rows = [("role", "processes", "one needs", "no room for", "largest node")]
    for place, need in enumerate(needs):
        rows.append((need.role, str(need.count), need_text(need), str(left.get(place, "-")), _largest(need, nodes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    settings = ", ".join(dict.fromkeys(needs[place].setting for place in left))
    there = "its one node has" if len(nodes) == 1 else f"its {len(nodes)} nodes have"
    more = ", and its autoscaler has no more that would" if grows else ""
    return (
        f"cluster: the run can never be placed: {there} no room for all of it{more}; "
        f"allowed: less ({settings}), other cluster.roles, or more nodes",
        table,
    )


def fits_labels(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node's labels are those that the selectors want: `v`, `!v`, `in(a,b)`, `!in(a,b)` (Ray's rules)."""
    return all(_selects(selector, labels.get(key)) for key, selector in wanted.items())


def need_text(need: Need) -> str:
    """What one process needs, in words."""
    amounts = [f"{amount:g} {key}" for key, amount in need.per_process.items()]
    return " and ".join(amounts) + "".join(f", {key}={value}" for key, value in need.labels.items())


def _selects(selector: str, value: str | None) -> bool:
    negated, rest = selector.startswith("!"), selector.removeprefix("!")
    inside = re.fullmatch(r"in\((.*)\)", rest)
    options = [one.strip() for one in inside[1].split(",")] if inside else [rest]
    return (value in options) != negated


def _size(resources: Mapping[str, float]) -> tuple[float, float]:
    return resources.get("GPU", 0.0), resources.get("CPU", 0.0)


def _fits(wanted: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(key, 0.0) + _SLACK >= amount for key, amount in wanted.items())


def _largest(need: Need, nodes: Sequence[Node]) -> str:
    """Of the nodes with the labels, the one with most GPUs, then CPUs."""
    suitable = [node for node in nodes if fits_labels(need.labels, node.labels)]
    if not suitable:
        return "none with these labels" if need.labels else "none"
    best = max(suitable, key=lambda node: _size(node.resources))
    amounts = " and ".join(f"{best.resources.get(key, 0.0):g} {key}" for key in need.per_process)
    return f"{amounts} ({best.name})" if best.name else amounts
