"""All settings of a run, merged from defaults, then a recipe, then the command line.

A recipe is a YAML file of differences from the defaults. There are at most 100 leaf keys, three levels deep. An unknown
key is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from deepgen.algorithms.rules import Overlap, check_group, choose_overlap
from deepgen.config.recipes import describe_yaml_error, parse_value, read_recipe
from deepgen.config.schema.choices import OneOf, ReplicasRule, ShareRule
from deepgen.config.schema.pools import PoolSettings, own_keys, pool_keys, pool_type, pool_types
from deepgen.config.schema.reward_weights import BY_SOURCE
from deepgen.config.schema.roles import role_fault
from deepgen.config.schema.section import Section
from deepgen.config.schema.sections import TASKS as TASKS
from deepgen.config.schema.sections import (
    AlgorithmSettings,
    ClusterSettings,
    DataSettings,
    EvaluationSettings,
    ExperienceSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    TrackingSettings,
    TrainSettings,
)
from deepgen.errors import UserError, nearest
from deepgen.masking import HIDDEN, is_secret, masked_value
from deepgen.registry import REWARDS

_NO_HINT = "; --help lists all keys"
_SHOWN = 200  # letters of a wrong value in an error
_OF_SOURCE = f"rewards.weights.{BY_SOURCE}"
ANY_POOL = "rewards.<name>"  # stands for every reward pool in lists of keys


class Settings(Section):
    """All settings of a run. Paths are absolute in this object, but portable between nodes in `model_dump()`."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    rollout: RolloutSettings = RolloutSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    rewards: RewardSettings = Field(default_factory=RewardSettings)  # a factory, because it imports the rewards
    experience: ExperienceSettings = ExperienceSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        check_group(self.algorithm.advantage, self.rollout.group_size, self.rollout.prompts_per_step)
        for name, role in self.cluster.roles.items():
            if fault := role_fault(name, role, tuple(self.rewards.pools)):
                raise ValueError(fault)
        return self

    def overlap(self) -> Overlap:
        """How the groups of an rl step reach the learner."""
        algorithm = self.algorithm
        return choose_overlap(
            self.experience.overlap,
            max_staleness=self.experience.max_staleness,
            updates=algorithm.updates_per_batch,
            advantage=algorithm.advantage,
            whiten=algorithm.whiten,
            policy_loss=algorithm.policy_loss,
            kl=algorithm.kl != "none" and algorithm.kl_beta > 0,
            zero_stage=self.train.zero_stage,
        )


def load_settings(recipe: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a recipe file (None: only defaults), with `key=value` overrides on top.

    Raises UserError with one line: the key, the given value and its place, the allowed values, the nearest spelling.
    """
    content, origin = merge_settings(recipe, overrides)
    _require_secrets(content, "", origin)
    return _validate(content, origin, from_user=True)


def _require_secrets(value: Any, key: str, origin: Mapping[str, str]) -> None:
    """Raise UserError if a value was written by `shown_settings`, which hid the secret in it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _require_secrets(inner, f"{key}.{name}" if key else str(name), origin)
    elif isinstance(value, list):
        for inner in value:
            _require_secrets(inner, key, origin)
    elif isinstance(value, str) and (value == HIDDEN or ("://" in value and HIDDEN in value)):
        place = f" {origin[key]}" if key in origin else ""
        raise UserError(f"{key}: got {value!r}{place}, whose secret was hidden when it was written; give it again")


def merge_settings(recipe: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged content, not validated yet, and where each key comes from. Raises UserError."""
    content = Settings().model_dump()
    # A pool's class decides which keys it has, and may still change. So drop the defaults of pools here.
    content["rewards"] = {"weights": content["rewards"]["weights"]}
    origin: dict[str, str] = {}
    if recipe is not None:
        _merge(content, read_recipe(recipe), "", f"in {recipe.name}", origin)
    pairs = [_split(override) for override in overrides]
    for key, text in pairs:
        if is_pool_class(key):
            _change_class(content["rewards"], key.split(".")[1], text)
    pools = pool_types(content["rewards"])
    leaves, groups = real_keys(pools), [*sections(), *(f"rewards.{name}" for name in pools)]
    for key, text in pairs:
        _override(content, key, text, leaves, groups)
        origin[key] = "on the command line"
    return content, origin


def _change_class(rewards: dict[str, Any], name: str, given: str) -> None:
    """Give a pool the class from the command line, and drop options that only its class in the recipe has."""
    pool = rewards.get(name, {})
    changed = {**pool, "class": given}
    old = pool_keys(pool_type(name, pool)) if "class" in pool or name in REWARDS else {}
    gone = old.keys() - pool_keys(pool_type(name, changed)).keys()
    rewards[name] = {key: value for key, value in changed.items() if key not in gone}


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"cannot read {override!r}; allowed: key=value, as in train.steps=10")
    return key, text


def is_pool_class(key: str) -> bool:
    """Whether the key sets a pool's class, which determines the pool's other keys."""
    return re.fullmatch(r"rewards\.[^.]+\.class", key) is not None


def settings_from_dict(content: Mapping[str, Any]) -> Settings:
    """The settings whose `model_dump()` is `content`, with paths resolved in this process. Raises UserError."""
    return _validate(content, {}, from_user=False)


def shown_settings(settings: Settings) -> dict[str, Any]:
    """`model_dump()` with secrets hidden: for everything that is printed or written. Secrets are in memory only."""
    shown: dict[str, Any] = masked_value("", settings.model_dump(mode="json"))
    return shown


def settings_hash(settings: Settings) -> str:
    """Hash of the settings, 12 hex digits. It ignores the folders for runs and cache, and whether a run is resumed."""
    content = settings.model_dump()
    del content["run"]["dir"], content["run"]["resume"], content["data"]["cache_dir"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _merge(base: dict[str, Any], changes: Mapping[str, Any], prefix: str, place: str, origin: dict[str, str]) -> None:
    leaves, groups = leaf_keys(), sections()
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if prefix == "rewards." and name != "weights":
            _merge_pool(base, name, value, place, origin)
        elif key in groups:
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


def _merge_pool(rewards: dict[str, Any], name: str, value: Any, place: str, origin: dict[str, str]) -> None:
    key = f"rewards.{name}"
    if "." in name:
        raise UserError(f"{key}: written with dots {place}; allowed: nested, a section and its keys under it")
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{key}: got {value!r} {place}; allowed: a section, as in '{key}: {{class: NAME}}'")
    rewards[name] = rewards.get(name, {}) | (value or {})
    origin |= {f"{key}.{option}": place for option in value or {}}


def _override(
    content: dict[str, Any], key: str, text: str, leaves: Mapping[str, FieldInfo], groups: Sequence[str]
) -> None:
    cell = key.startswith("rewards.weights.") and (key.count(".") <= 3 or key.startswith(_OF_SOURCE))
    cell = cell or key.startswith("cluster.roles.")
    if key in groups:
        inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
        raise UserError(f"{key}: is a section; allowed: one of its keys, as in {inside[0]}=...")
    if key not in leaves and not cell:
        pool = ".".join(key.split(".")[:2])
        new = pool.startswith("rewards.") and pool not in groups
        more = f" (a new pool needs {pool}.class=NAME or package.module:Class)" if new else ""
        raise UserError(f"unknown key {key!r} on the command line{_hint(key, leaves) or _NO_HINT}{more}")
    value = text if not cell and leaves[key].annotation in (str, Path) else _parse(key, text)
    *path, name = _parts(key, value)
    for part in path:
        inner = content.setdefault(part, {})
        content = inner if isinstance(inner, dict) else {}  # validation reports it if a recipe has no mapping here
    content[name] = value


def _parts(key: str, value: Any) -> list[str]:
    """The names in a dotted key. The name of a data set may have dots; the reward after it has none."""
    if not key.startswith(_OF_SOURCE):
        return key.split(".")
    row = key.removeprefix("rewards.weights.")
    return ["rewards", "weights", *([row] if isinstance(value, Mapping) else row.rsplit(".", 1))]


def _hint(key: str, leaves: Iterable[str]) -> str:
    """A hint with the key that was probably meant. For a key of a pool it considers only that pool's keys."""
    pool = key.rpartition(".")[0]
    options = {leaf.removeprefix(f"{pool}."): leaf for leaf in leaves if leaf.startswith(f"{pool}.")}
    if not pool.startswith("rewards.") or not options:
        return nearest(key, leaves)
    close = get_close_matches(key.removeprefix(f"{pool}."), options, n=1)
    return f"; did you mean {options[close[0]]!r}?" if close else f"; allowed in this pool: {', '.join(options)}"


def _parse(key: str, text: str) -> Any:
    try:
        return parse_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: cannot read {text!r} on the command line: {describe_yaml_error(error)}") from error


def _validate(content: Mapping[str, Any], origin: Mapping[str, str], *, from_user: bool) -> Settings:
    try:
        return Settings.model_validate(content, context={"from_user": from_user})
    except ValidationError as error:
        rewards = content.get("rewards")
        pools = pool_types(rewards if isinstance(rewards, Mapping) else {})
        raise UserError(_describe(error, origin, real_keys(pools))) from error


def _describe(error: ValidationError, origin: Mapping[str, str], leaves: Mapping[str, FieldInfo]) -> str:
    """One line: the first problem, and the number of other keys with problems."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"])
        leaf = next((key for key in leaves if dotted == key or dotted.startswith(f"{key}.")), None)
        place = next((f" {origin[key]}" for key in (dotted, leaf) if key and key in origin), "")
        if problem["type"] == "value_error":
            said = str(problem["ctx"]["error"])  # a section's message names its keys, a pool's message cannot
            lines.setdefault(dotted, f"{dotted}: {said}" if dotted.startswith("rewards.") else said)
        elif problem["type"] == "extra_forbidden":
            lines.setdefault(dotted, f"unknown key {dotted!r}{place}{_hint(dotted, leaves)}")
        elif leaf is None:
            lines.setdefault(dotted, f"{dotted}: got {problem['input']!r}; allowed: a section of keys")
        else:
            key = dotted if leaf.endswith((".weights", ".roles")) else leaf
            given = None if problem["type"] == "missing" else problem["input"]
            said = "nothing" if given is None else HIDDEN if is_secret(key) else repr(given)
            said = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}… ({len(said)} letters)"
            if problem["type"] == "no_path":
                lines.setdefault(key, f"{key}: got {said}{place}, {problem['msg']}")
                continue
            options = [str(o) for o in _options(leaves[leaf])]
            hint = nearest(given, options) if isinstance(given, str) else ""
            lines.setdefault(key, f"{key}: got {said}{place}; allowed: {allowed_values(leaves[leaf])}{hint}")
    first, *others = lines.values()
    return first + (f" (and {len(others)} more)" if others else "")


def _options(field: FieldInfo) -> Iterator[Any]:
    """The allowed values of a key, if they are a list."""
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


def leaf_keys(pools: Mapping[str, type[PoolSettings]] | None = None) -> dict[str, FieldInfo]:
    """Dotted name and field of every leaf key, in order. Keys that all reward pools have appear once, under ANY_POOL.

    pools: settings class of each pool, by name; default: the registered rewards.
    """
    pools = pool_types({}) if pools is None else pools
    found: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        if name != "rewards":
            found |= {f"{name}.{key}": inner for key, inner in _section_type(field).model_fields.items()}
            continue
        found["rewards.weights"] = RewardSettings.model_fields["weights"]
        found |= {f"{ANY_POOL}.{key}": inner for key, inner in pool_keys(PoolSettings).items()}
        for pool, kind in pools.items():
            found |= {f"rewards.{pool}.{key}": inner for key, inner in own_keys(kind).items()}
    return found


def real_keys(pools: Mapping[str, type[PoolSettings]]) -> dict[str, FieldInfo]:
    """`leaf_keys` as users write them: every pool with all its keys, and no ANY_POOL."""
    found = {key: field for key, field in leaf_keys({}).items() if not key.startswith(ANY_POOL)}
    for pool, kind in pools.items():
        found |= {f"rewards.{pool}.{key}": field for key, field in pool_keys(kind).items()}
    return found


def sections() -> dict[str, type[Section]]:
    """Dotted name and class of every section, in order."""
    found: dict[str, type[Section]] = {}
    for name, field in Settings.model_fields.items():
        found[name] = _section_type(field)
        if name == "rewards":
            found[ANY_POOL] = PoolSettings
    return found


def _section_type(field: FieldInfo) -> type[Section]:
    kind = field.annotation
    assert isinstance(kind, type) and issubclass(kind, Section)
    return kind


def allowed_values(field: FieldInfo) -> str:
    """The allowed values of a key in words: "whole number >= 1", "cps, flow_sde, dance_sde or ode", "path"."""
    for limit in field.metadata:
        if isinstance(limit, OneOf | ShareRule | ReplicasRule):
            return limit.allowed
    said = field.json_schema_extra.get("allowed") if isinstance(field.json_schema_extra, dict) else ""
    return str(said or _allowed(field.annotation, field.metadata))


def _allowed(kind: Any, limits: Sequence[Any]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _allowed(arguments[0], [m for a in arguments[1:] for m in getattr(a, "metadata", [a])])
    if origin is Literal:
        return " or ".join(", ".join(str(a) for a in arguments).rsplit(", ", 1))
    if origin in (Union, UnionType):
        return " or ".join(_allowed(a, []) for a in arguments)
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", dict: "a mapping"}
    kind = origin or kind
    return " ".join([names.get(kind, getattr(kind, "__name__", str(kind))), *_limits(limits)])


def _limits(limits: Sequence[Any]) -> Iterator[str]:
    names = ("min_length", "ge", "gt", "le", "lt", "multiple_of")
    found = {n: getattr(limit, n) for limit in limits for n in names if getattr(limit, n, None) is not None}
    if "min_length" in found:
        yield "that is not empty"
    if "ge" in found and "le" in found:
        yield f"from {found.pop('ge')} to {found.pop('le')}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    yield from filter(None, [" and ".join(f"{sign} {found[name]}" for name, sign in signs.items() if name in found)])
    if "multiple_of" in found:
        yield f"and a multiple of {found['multiple_of']}"
