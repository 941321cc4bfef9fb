"""All settings of a run and how they come together: defaults, then a recipe, then the command line.

A recipe is a YAML file of differences. At most 100 leaf keys, three levels deep; an unknown key is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from deepgen.algorithms.rules import check_group
from deepgen.config.choices import OneOf
from deepgen.config.recipes import describe_yaml_error, parse_value, read_recipe
from deepgen.config.sections import (
    TASKS,
    AlgorithmSettings,
    ClusterSettings,
    DataSettings,
    EvaluationSettings,
    ExperienceSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    Section,
    TrackingSettings,
    TrainSettings,
)
from deepgen.errors import UserError, nearest

_NO_HINT = "; --help lists all keys"


class Settings(Section):
    """All settings of a run. Paths are absolute in this object and portable in `model_dump()`."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    rollout: RolloutSettings = RolloutSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    rewards: RewardSettings = RewardSettings()
    experience: ExperienceSettings = ExperienceSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        check_group(self.algorithm.advantage, self.rollout.group_size, self.rollout.prompts_per_step)
        return self


def load_settings(recipe: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a recipe file (None: only defaults) with `key=value` overrides on top.

    Raises UserError with one line: the key, what was given and where, what is allowed, the nearest spelling.
    """
    content = Settings().model_dump()
    origin: dict[str, str] = {}
    if recipe is not None:
        _merge(content, read_recipe(recipe), "", f"in {recipe.name}", origin)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"cannot read {override!r}; allowed: key=value, as in train.steps=10")
        _override(content, key, text)
        origin[key] = "on the command line"
    return _validate(content, origin, from_user=True)


def settings_from_dict(content: Mapping[str, Any]) -> Settings:
    """The settings whose `model_dump()` was `content`, with paths found again in this process. UserError if invalid."""
    return _validate(content, {}, from_user=False)


def settings_hash(settings: Settings) -> str:
    """12 hex digits that agree when two runs have the same settings, wherever they lie and whether resumed or not."""
    content = settings.model_dump()
    del content["run"]["dir"], content["run"]["resume"], content["data"]["cache_dir"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _merge(base: dict[str, Any], changes: Mapping[str, Any], prefix: str, place: str, origin: dict[str, str]) -> None:
    leaves, groups = leaf_keys(), sections()
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if key in groups:
            if value is not None and not isinstance(value, Mapping):
                raise UserError(f"{key}: got {value!r} {place}; allowed: a section, as in '{key}: {{key: value}}'")
            _merge(base[name], value or {}, f"{key}.", place, origin)
        elif key == "rewards.weights" and isinstance(value, Mapping):
            base[name] |= value
            origin[key] = place
        elif key in leaves:
            if "." in name:
                raise UserError(f"{key}: written with dots {place}; allowed: nested, a section and its keys under it")
            base[name] = value
            origin[key] = place
        else:
            raise UserError(f"unknown key {key!r} {place}{nearest(key, [*leaves, *groups]) or _NO_HINT}")


def _override(content: dict[str, Any], key: str, text: str) -> None:
    leaves, groups = leaf_keys(), sections()
    if key in groups:
        inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
        raise UserError(f"{key}: is a section; allowed: one of its keys, as in {inside[0]}=...")
    cell = key.startswith("rewards.weights.") and key.count(".") <= 3
    if key not in leaves and not cell:
        raise UserError(f"unknown key {key!r} on the command line{nearest(key, leaves) or _NO_HINT}")
    *path, name = key.split(".")
    for part in path:
        inner = content.setdefault(part, {})
        content = inner if isinstance(inner, dict) else {}  # a recipe's row that is no mapping is reported later
    content[name] = text if not cell and leaves[key].annotation in (str, Path) else _parse(key, text)


def _parse(key: str, text: str) -> Any:
    try:
        return parse_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: cannot read {text!r} on the command line: {describe_yaml_error(error)}") from error


def _validate(content: Mapping[str, Any], origin: Mapping[str, str], *, from_user: bool) -> Settings:
    try:
        return Settings.model_validate(content, context={"from_user": from_user})
    except ValidationError as error:
        raise UserError(_describe(error, origin)) from error


def _describe(error: ValidationError, origin: Mapping[str, str]) -> str:
    """One line for the first problem, and how many keys have others."""
    leaves = leaf_keys()
    lines: dict[str, str] = {}
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"])
        leaf = next((key for key in leaves if dotted == key or dotted.startswith(f"{key}.")), None)
        if problem["type"] == "value_error":
            lines.setdefault(dotted, str(problem["ctx"]["error"]))
        elif problem["type"] == "extra_forbidden":
            lines.setdefault(dotted, f"unknown key {dotted!r}{nearest(dotted, leaves)}")
        elif leaf is None:
            lines.setdefault(dotted, f"{dotted}: got {problem['input']!r}; allowed: a section of keys")
        else:
            key = dotted if leaf.endswith(".weights") else leaf
            given = problem["input"]
            said = "nothing" if given is None else repr(given)
            place = next((f" {origin[k]}" for k in (key, leaf) if k in origin), "")
            options = [str(o) for o in _options(leaves[leaf])]
            hint = nearest(given, options) if isinstance(given, str) else ""
            lines.setdefault(key, f"{key}: got {said}{place}; allowed: {allowed_values(leaves[leaf])}{hint}")
    first, *others = lines.values()
    return first + (f" (and {len(others)} more)" if others else "")


def _options(field: FieldInfo) -> Iterator[Any]:
    """What a key may be, where that is a list."""
    for choice in field.metadata:
        if isinstance(choice, OneOf):
            yield from choice.names
    yield from _literals(field.annotation)


def _literals(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    else:
        for argument in get_args(kind):
            yield from _literals(argument)


# ---- Keys and what they allow ----


def leaf_keys() -> dict[str, FieldInfo]:
    """Dotted name of every leaf key, in order, with its field."""
    return dict(_walk(Settings, ""))


def sections() -> dict[str, type[Section]]:
    """Dotted name of every section, in order, with its class."""
    found: dict[str, type[Section]] = {}
    for name, field in Settings.model_fields.items():
        found[name] = _section_type(field)  # type: ignore[assignment]
        for inner, inner_field in found[name].model_fields.items():
            if section := _section_type(inner_field):
                found[f"{name}.{inner}"] = section
    return found


def _section_type(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if inner := _section_type(field):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def allowed_values(field: FieldInfo) -> str:
    """What a key accepts, in words: "whole number >= 1", "cps, flow_sde, dance_sde or ode", "path"."""
    choice = next((limit for limit in field.metadata if isinstance(limit, OneOf)), None)
    return choice.allowed if choice else _allowed(field.annotation, field.metadata)


def _allowed(kind: Any, limits: Sequence[Any]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _allowed(arguments[0], [m for a in arguments[1:] for m in getattr(a, "metadata", [a])])
    if origin is Literal:
        return " or ".join(", ".join(str(a) for a in arguments).rsplit(", ", 1))
    if origin in (Union, UnionType):
        return " or ".join(_allowed(a, []) for a in arguments)
    if origin is dict and get_origin(arguments[1]) is not dict:
        return "a weight >= 0 for each source, as in {photos: 2, posters: 1}"
    if origin is dict:
        return f"a weight >= 0 for each reward ({', '.join(RewardSettings.names())}) of a task ({', '.join(TASKS)})"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    return " ".join([names[kind], *_limits(limits)])


def _limits(limits: Sequence[Any]) -> Iterator[str]:
    names = ("pattern", "min_length", "ge", "gt", "le", "lt", "multiple_of")
    found = {n: getattr(limit, n) for limit in limits for n in names if getattr(limit, n, None) is not None}
    if "pattern" in found:
        yield "of letters, digits, dot, dash and underscore"
    if "min_length" in found:
        yield "that is not empty"
    if "ge" in found and "le" in found:
        yield f"from {found.pop('ge')} to {found.pop('le')}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    yield from filter(None, [" and ".join(f"{sign} {found[name]}" for name, sign in signs.items() if name in found)])
    if "multiple_of" in found:
        yield f"and a multiple of {found['multiple_of']}"
