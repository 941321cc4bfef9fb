"""Paths in settings: they work from any current folder and on every node of a cluster.

A run may start in the checkout, in the uploaded copy of a submitted job, or elsewhere, and Ray Train gives each worker
a folder of its own. So an input path is searched in the current folder and in the checkout that contains this code.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import BeforeValidator, PlainSerializer, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from deepgen.errors import UserError
from deepgen.storage.staging import address_of, is_bucket, staged

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")  # two letters or more
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def _find_checkout() -> Path | None:
    """The folder that holds stages/ and this code; for an installed package, the current or the install folder."""
    here = Path(__file__).resolve()
    for folder in (here.parents[4], Path.cwd(), here.parents[3]):
        if (folder / "stages" / "recipes").is_dir():
            return folder
    return None


CHECKOUT = _find_checkout()


def expanded(given: str | Path) -> Path:
    """The path that is meant, not yet absolute: `file://` is a path, ~ a home folder, $NAME and ${NAME} variables.

    Raises ValueError with the reason for what no folder of this machine can be: another scheme, as in s3://, a variable
    that is not set, a user that is unknown, a control character.
    """
    path = os.fspath(given)
    names = [braces or name for braces, name in _VARIABLE.findall(path)]
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"but the variable {missing[0]} is not set")
    path = _without_scheme(_VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], path))
    path = os.path.expanduser(path)
    if path.startswith("~") and not exists(Path(path)):
        raise ValueError(f"but there is no home folder {path.partition('/')[0]}")
    if any(ord(letter) < 32 for letter in path):
        raise ValueError("which has a control character in it; allowed: letters that one can see")
    return Path(path)


def _without_scheme(path: str) -> str:
    """The path of a `file://` address, or the path itself. ValueError for an address of another kind."""
    scheme, colon, rest = path.partition(":/")
    if not colon or not _SCHEME.fullmatch(scheme):
        return path
    if scheme.lower() != "file":
        raise ValueError(f"an address of kind {scheme}://; allowed: a folder or file that this machine sees as a path")
    host, slash, inner = rest.removeprefix("/").partition("/") if rest.startswith("/") else ("", "/", rest)
    if host.lower() not in ("", "localhost") or not slash:
        raise ValueError("an address without a full path on this machine; allowed: file:///full/path, or the path")
    return unquote(f"/{inner}")


def given_path(key: str, text: str | Path) -> Path:
    """`expanded`, with a UserError that names the setting or option."""
    try:
        return expanded(text)
    except ValueError as error:
        raise UserError(f"{key}: got {str(text)!r}, {error}") from error


def argument(given: str) -> Path:
    """`expanded` as the `type` of a program's argument. Raises argparse.ArgumentTypeError."""
    try:
        return expanded(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {given!r}, {error}") from error


def exists(path: Path) -> bool:
    """Whether the path exists; False for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def resolve_path(path: str | Path, *, current_folder_first: bool = True) -> Path:
    """Absolute path of an input in the current folder or the checkout; `path` unchanged if neither has it."""
    path = Path(path)
    folders = [Path.cwd(), *([CHECKOUT] if CHECKOUT else [])]
    for folder in folders if current_folder_first else reversed(folders):
        if exists(folder / path):
            return Path(os.path.normpath(folder / path))
    return path


def _expanded(value: str | Path) -> Path:
    try:
        return expanded(value)
    except ValueError as error:
        raise PydanticCustomError("no_path", "{why}", {"why": str(error)}) from error


def _read_input(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path) or not str(value):
        return value
    from_user = bool(info.context and info.context.get("from_user"))
    return resolve_path(_expanded(value), current_folder_first=from_user)


def _read_output(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        return value
    return Path(os.path.normpath(Path.cwd() / _expanded(value)))


def _read_run_folder(value: object) -> object:
    """As an output, and an address in a bucket becomes its staging folder."""
    if not isinstance(value, str) or not is_bucket(value):
        return _read_output(value)
    try:
        return staged(value)
    except ValueError as error:
        raise PydanticCustomError("no_path", "{why}", {"why": str(error)}) from error


def _shown_run_folder(path: Path) -> str:
    return address_of(path) or str(path)


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
RunFolder = Annotated[Path, BeforeValidator(_read_run_folder), PlainSerializer(_shown_run_folder)]
OptionalOutputPath = Annotated[str, BeforeValidator(_read_optional_output)]  # "": no path


def is_input(field: FieldInfo) -> bool:
    """Whether a key is an `InputPath`."""
    return _INPUT in field.metadata
