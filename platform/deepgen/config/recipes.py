"""Reads recipes: YAML without its surprises.

Unlike with PyYAML's defaults, 1e-4 is a number, only true and false are booleans (no, on and off are text), dates and
1:30 are text, 012 is not octal, and a repeated key is an error (PyYAML keeps the last value).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deepgen.config.schema.paths import CHECKOUT, exists, given_path
from deepgen.errors import UserError, nearest

_SCALARS = (
    ("null", r"~|null|", "~n"),
    ("bool", r"true|True|false|False", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
)
_MAX_NODES = 100_000  # of a recipe


class _RecipeLoader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        """The content. Raises ConstructorError if its aliases (`*name`) would make it endless, or very large."""
        whole: yaml.Node | None = super().get_single_node()
        count, left = 0, [whole] if whole else []
        while left:
            node, count = left.pop(), count + 1
            if count > _MAX_NODES:
                raise yaml.constructor.ConstructorError(None, None, f"more than {_MAX_NODES:,} values", node.start_mark)
            if isinstance(node, yaml.MappingNode):
                left += (one for pair in node.value for one in pair)
            elif isinstance(node, yaml.SequenceNode):
                left += node.value
        return whole

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen:
                problem = f"key {key.value!r} is given twice, first on line {seen[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = line
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_RecipeLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _RecipeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""] if _tag == "null" else list(_first)
    )


def parse_value(text: str) -> Any:
    """The value of `text` in a recipe; plain data only, as with a SafeLoader. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except (ValueError, KeyError) as error:  # `!!int abc`, or a number with thousands of digits
        raise yaml.constructor.ConstructorError(None, None, f"a value that is none of its kind ({error})") from error
    except RecursionError as error:
        raise yaml.constructor.ConstructorError(None, None, "too many levels") from error


def find_recipe(name_or_path: str | Path) -> Path:
    """Path of a recipe: `tiny-rl` is stages/recipes/tiny-rl.yaml, other values are paths. UserError if missing."""
    folder = (CHECKOUT or Path.cwd()) / "stages" / "recipes"
    given = given_path("--recipe", name_or_path)
    candidates = [given, folder / given.name, folder / f"{name_or_path}.yaml"]
    if CHECKOUT:
        candidates.insert(1, CHECKOUT / given)
    for path in candidates:
        if exists(path) and path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    hint = nearest(str(name_or_path), known)
    raise UserError(
        f"--recipe: no file or recipe {str(name_or_path)!r}{hint or ';'} allowed: {', '.join(known)}, or a YAML file"
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Contents of a recipe file. Raises UserError with file and line if it is not a YAML mapping."""
    try:
        content = parse_value(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not a text file; allowed: YAML in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not valid YAML: {describe_yaml_error(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"recipe {path}: got a {type(content).__name__}; allowed: sections with keys, as in 'train:'")
    return content


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """One line: the problem and, if known, its place."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)
