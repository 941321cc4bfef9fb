"""The container recipe: instructions that exist, sources that are there, a normal user, no secrets. It is not built."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.helpers.manifests import SECRET_NAME, SECRET_VALUE

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "clusters" / "container"
KNOWN = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "CMD", "ARG", "LABEL", "ENTRYPOINT"}
# Read by something else than our code: where each is looked up.
OUTSIDE = {
    "PATH": "the shell",
    "HOME": "libc",
    "NVIDIA_VISIBLE_DEVICES": "NVIDIA's container runtime",
    "NVIDIA_DRIVER_CAPABILITIES": "NVIDIA's container runtime",
}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a recipe, with lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word, rest.strip()) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]
    ]


RECIPE = (FOLDER / "Containerfile").read_text(encoding="utf-8")
IGNORED = (FOLDER / "Containerfile.dockerignore").read_text(encoding="utf-8")


def of(name: str, text: str = RECIPE) -> list[str]:
    return [rest for word, rest in instructions(text) if word == name]


def copied(text: str) -> list[str]:
    """Sources of all COPYs from the checkout."""
    found = [shlex.split(rest) for rest in of("COPY", text)]
    return [source for words in found if not words[0].startswith("--from=") for source in words[:-1]]


def faults(text: str) -> list[str]:
    found = [f"unknown instruction {word}" for word, _ in instructions(text) if word not in KNOWN]
    found += [f"COPY {source}: not there" for source in copied(text) if not (ROOT / source).exists()]
    user = (of("USER", text) or ["root"])[-1].partition(":")[0]
    if not user.isdigit() or int(user) == 0:  # Kubernetes can tell that a number is not root, and not of a name
        found.append(f"USER: {user}")
    if any(line.split()[0].count(":") != 1 or line.split()[0].endswith(":latest") for line in of("FROM", text)):
        found.append("FROM: no fixed tag")
    found += ["a secret" for line in text.splitlines() if SECRET_VALUE.search(line)]
    found += [f"ENV {name}: a secret" for name in environment(text) if SECRET_NAME.search(name)]
    return found


def environment(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of("ENV", text) for pair in shlex.split(rest) if "=" in pair)


def test_the_recipe_has_no_fault() -> None:
    assert faults(RECIPE) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("USER 10001:10001", "USER root", "USER: root"),
        ("USER 10001:10001", "", "USER: root"),
        ("COPY stages stages", "COPY stagess stages", "COPY stagess: not there"),
        ("WORKDIR", "WORKDIRECTORY", "unknown instruction WORKDIRECTORY"),
        ("python:3.11-slim-bookworm AS", "python:latest AS", "FROM: no fixed tag"),
        ("HOME=/tmp", "HF_TOKEN=x", "ENV HF_TOKEN: a secret"),
        ("CMD", "# hf_" + "a" * 30 + "\nCMD", "a secret"),
    ],
)
def test_a_fault_is_found(old: str, new: str, said: str) -> None:
    assert old in RECIPE and said in faults(RECIPE.replace(old, new))


def test_it_installs_by_the_installer_of_all_clusters() -> None:
    assert "clusters/install.sh /opt/venv gpu,nixl" in of("RUN")
    assert environment(RECIPE)["PATH"].startswith("/opt/venv/bin:")


def test_what_is_copied_is_not_ignored_and_secrets_are() -> None:
    lines = [line for line in IGNORED.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert set(copied(RECIPE)) - {"clusters/install.sh"} <= allowed and "clusters/install.sh" in allowed
    assert allowed <= set(copied(RECIPE))
    for path in (".git", ".venv", "runs", "tests", ".env"):
        assert not any(fnmatch(path, one) for one in allowed)
    assert {"**/.env*", "**/*.pem", "**/*.key"} <= set(lines)


def test_its_environment_names_what_somebody_reads() -> None:
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "platform").rglob("*.py"))
    ours += (ROOT / "Makefile").read_text(encoding="utf-8")
    python = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    unknown = [name for name in environment(RECIPE) if name not in {*OUTSIDE, *python} and name not in ours]
    assert unknown == []


def test_the_image_of_the_manifests_has_the_code_where_they_look() -> None:
    places = {shlex.split(rest)[-1] for rest in of("COPY")}
    assert "/opt/deepgen/stages" in places and environment(RECIPE)["PYTHONPATH"] == "/opt/deepgen"
