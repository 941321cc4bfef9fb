"""Paths in settings: they work from any current folder and on every node of a cluster.

A run may start in the checkout, in the uploaded copy of a submitted job, or elsewhere, and Ray Train gives each worker
a folder of its own. So an input path is searched in the current folder and in the checkout that contains this code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, ValidationInfo
from pydantic.fields import FieldInfo


def _find_checkout() -> Path | None:
    """The folder that holds stages/ and this code; for an installed package, the current or the install folder."""
    here = Path(__file__).resolve()
    for folder in (here.parents[4], Path.cwd(), here.parents[3]):
        if (folder / "stages" / "recipes").is_dir():
            return folder
    return None


CHECKOUT = _find_checkout()


def expanded(path: str | Path) -> Path:
    """The path with ~ and ~name replaced by home folders; unchanged if no user has that name."""
    return Path(os.path.expanduser(path))


def exists(path: Path) -> bool:
    """Whether the path exists; False for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def resolve_path(path: str | Path, *, current_folder_first: bool = True) -> Path:
    """Absolute path of an input in the current folder or the checkout; `path` unchanged if neither has it."""
    path = expanded(path)
    folders = [Path.cwd(), *([CHECKOUT] if CHECKOUT else [])]
    for folder in folders if current_folder_first else reversed(folders):
        if exists(folder / path):
            return Path(os.path.normpath(folder / path))
    return path


def _read_input(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path) or not str(value):
        return value
    from_user = bool(info.context and info.context.get("from_user"))
    return resolve_path(value, current_folder_first=from_user)


def _read_output(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        return value
    return Path(os.path.normpath(Path.cwd() / expanded(value)))


def _read_optional_output(value: object) -> object:
    found = _read_output(value)
    return str(found) if isinstance(found, Path) else found


def _portable(path: Path) -> str:
    """The path relative to the checkout if it is inside, as each node of a cluster has its checkout elsewhere."""
    if CHECKOUT and path.is_relative_to(CHECKOUT):
        return path.relative_to(CHECKOUT).as_posix()
    return str(path)


_INPUT = BeforeValidator(_read_input)
InputPath = Annotated[Path, _INPUT, PlainSerializer(_portable)]
OutputPath = Annotated[Path, BeforeValidator(_read_output), PlainSerializer(str)]
OptionalOutputPath = Annotated[str, BeforeValidator(_read_optional_output)]  # "": no path


def is_input(field: FieldInfo) -> bool:
    """Whether a key is an `InputPath`."""
    return _INPUT in field.metadata
