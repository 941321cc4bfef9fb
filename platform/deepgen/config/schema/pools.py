"""Reward pools in the settings: the keys that every pool has, and the options that its reward class declares.

`rewards.<name>` sets the reward that a pool runs (`class`) and its options. Weights, metrics and tables call the pool
`<name>`. A reward declares its options in its own file, as `class Options(PoolSettings)` inside the reward's class, so
reading settings imports the class of every pool. Left out: sections within options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import PrivateAttr, TypeAdapter
from pydantic.fields import FieldInfo

from deepgen.config.schema.choices import OneOf, Replicas, Share, limits
from deepgen.config.schema.paths import is_input
from deepgen.config.schema.section import Section, setting
from deepgen.errors import UserError, nearest
from deepgen.registry import REWARDS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_METHODS = ("score", "score_groups")
_RESERVED = ("weights", "total")  # a key beside the pools; the weighted sum's name in metrics


class PoolSettings(Section):
    """One reward pool. A reward with its own options adds them in a subclass."""

    about: ClassVar[str] = "a pool of replicas of one reward; any number of pools, also two of one class"
    class_: Annotated[str, OneOf(REWARDS)] = setting(
        ..., "The reward. May be left out where the pool is called like a registered one.", alias="class"
    )
    replicas: Replicas = setting(
        1, "Actors that score in parallel; with 1..4 between 1, when idle, and 4, while requests wait."
    )
    batch_size: int = setting(64, "Images in one call.", unit="images", ge=1)
    deadline_s: float = setting(
        120.0, "Longest wait for one call; after all retries the score is missing.", unit="s", gt=0
    )
    retries: int = setting(2, "Further attempts after a failed call.", ge=0, le=20)
    required: bool = setting(
        False, "Whether the run ends when the reward has not answered for deadline_s; else its scores are missing."
    )
    environment: list[str] = setting(
        [], "Lines of a pip requirements file for a virtual environment of the reward's own; none: it runs in ours."
    )
    gpus: Share = setting(0.0, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")
    _pool: str = PrivateAttr("")

    @property
    def least_replicas(self) -> int:
        """How many actors there are at the start and when idle."""
        return limits(self.replicas)[0]

    @property
    def most_replicas(self) -> int:
        """How many actors there are at most."""
        return limits(self.replicas)[1]

    @property
    def pool_name(self) -> str:
        """The pool's name under `rewards`."""
        return self._pool

    def dotted(self, option: str) -> str:
        """The key of an option, for errors: "rewards.judge.path"."""
        return f"rewards.{self._pool}.{option}"

    def input_paths(self) -> dict[str, Path]:
        """The files and folders that the reward reads, by key."""
        return {
            self.dotted(name): getattr(self, name) for name, field in type(self).model_fields.items() if is_input(field)
        }

    def reward_class(self) -> type[Any]:
        """The reward's class. Raises UserError if this process cannot import it."""
        return reward_class(self.class_, self.dotted("class"))

    def __reduce__(self) -> tuple[Any, ...]:
        return make_pool, (self._pool, self.model_dump())


def reward_class(given: str, key: str) -> type[Any]:
    """The class for a name or import path, after checking that it is a reward (`rewards.base.Reward`).

    key: setting that error messages name. Raises UserError for an unknown name, module or attribute, and for anything
    that is not a reward.
    """
    found, path = REWARDS.load(given, key), REWARDS.path(given, key)
    if not isinstance(found, type) or not any(callable(getattr(found, method, None)) for method in _METHODS):
        what = "class without it" if isinstance(found, type) else type(found).__name__
        raise UserError(
            f"{key}: got {path!r}, a {what}; allowed: a class with a method score(requests), or score_groups(groups) "
            "if it compares the images of a prompt, see docs/own-reward.md"
        )
    if hasattr(found, "from_settings"):
        raise UserError(
            f"{key}: {path!r} has from_settings, as rewards had before; now: class Options(PoolSettings) with its "
            "options, which __init__(self, options) gets; see docs/own-reward.md"
        )
    options = getattr(found, "Options", PoolSettings)
    if not isinstance(options, type) or not issubclass(options, PoolSettings):
        raise UserError(f"{key}: Options of {path!r} are no settings; allowed: class Options(PoolSettings)")
    return found


def pool_type(name: str, content: Any) -> type[PoolSettings]:
    """The settings class of pool `name`, declared by its reward. `content` is unchecked input. Raises UserError."""
    if not isinstance(content, Mapping):
        return PoolSettings  # its validation will reject `content`
    given = content.get("class", name if name in REWARDS else None)
    if given is None:
        raise UserError(
            f"rewards.{name}: unknown reward {name!r}{nearest(name, ['weights', *REWARDS])}; for a pool of your own "
            f"write its class, rewards.{name}.class: NAME or package.module:Class; names: {', '.join(REWARDS)}"
        )
    if not isinstance(given, str):
        return PoolSettings
    options: type[PoolSettings] = getattr(reward_class(given, f"rewards.{name}.class"), "Options", PoolSettings)
    return options


def pool_types(content: Mapping[str, Any]) -> dict[str, type[PoolSettings]]:
    """`pool_type` of each pool by name: the registered rewards, then other pools in `content`. Raises UserError."""
    names = [name for name in dict.fromkeys([*REWARDS, *content]) if name != "weights"]
    return {name: pool_type(name, _section(content.get(name))) for name in names}


def make_pools(content: Mapping[str, Any], context: Any = None) -> dict[str, PoolSettings]:
    """Pools by name, from the content of `rewards` without its weights. Every registered reward has a pool.

    Raises UserError for a wrong class, and pydantic's ValidationError for wrong options.
    """
    return {name: make_pool(name, content.get(name), context) for name in dict.fromkeys([*REWARDS, *content])}


def make_pool(name: str, content: Any, context: Any = None) -> PoolSettings:
    """The settings of one pool. Raises the errors of `make_pools`."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UserError(
            f"rewards.{name}: {name!r} cannot be the name of a pool; allowed: letters, digits, dash and underscore, "
            f"but not {' or '.join(_RESERVED)}"
        )
    content = _section(content)
    kind = pool_type(name, content)
    if isinstance(content, Mapping) and name in REWARDS:
        content = {"class": name, **content}
    # Validate a dictionary, so that errors name the pool.
    pools: TypeAdapter[dict[str, PoolSettings]] = TypeAdapter(dict[str, kind])  # type: ignore[valid-type]
    pool = pools.validate_python({name: content}, context=context)[name]
    pool._pool = name
    return pool


def _section(content: Any) -> Any:
    """Content of a section; empty for None, which YAML gives for `judge:` with nothing under it."""
    return {} if content is None else content


# ---- Keys ----


def pool_keys(kind: type[PoolSettings]) -> dict[str, FieldInfo]:
    """A pool's keys, spelled as in recipes, with their fields."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def own_keys(kind: type[PoolSettings]) -> dict[str, FieldInfo]:
    """The `pool_keys` that other pools lack or have with another default."""
    common = pool_keys(PoolSettings)
    return {
        key: field
        for key, field in pool_keys(kind).items()
        if key not in common or field.default != common[key].default
    }


def about_pool(name: str, content: Any) -> str:
    """One line for `--help`: the pool's class and the first line of its docstring."""
    given = content.get("class", name) if isinstance(content, Mapping) else name
    lines = (inspect.getdoc(reward_class(given, f"rewards.{name}.class")) or "").splitlines()
    return f"class {given}" + (f". {lines[0]}" if lines else "")
