"""Types of keys that are checked by rule: a name from a list or registry (`OneOf`), a share of a resource, a range."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from deepgen.errors import UserError
from deepgen.registry import Registry


class OneOf:
    """Annotation of a `str` key that must be one of `names`. If `names` is a registry, any import path is valid too."""

    def __init__(self, names: Iterable[str], *more: str) -> None:
        self._registry = names if isinstance(names, Registry) else None
        self.names = (*names, *more)

    @property
    def allowed(self) -> str:
        """The allowed values in words, for `--help` and errors: "a, b or c"."""
        return " or ".join(", ".join(self.names).rsplit(", ", 1)) + (
            ", or the path package.module:NAME of your own" if self._registry else ""
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, given: str) -> str:
        if given in self.names:
            return given
        if self._registry is not None:
            try:
                self._registry.path(given)
            except UserError as error:
                raise PydanticCustomError("one_of", "{error}", {"error": str(error)}) from error
            return given
        raise PydanticCustomError("one_of", "not one of the names")


class ShareRule:
    """Annotation of a `float` key: the amount of a resource for one process. Ray allows fractions only up to 1."""

    allowed = "0 or more, above 1 a whole number"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    @staticmethod
    def _check(given: float) -> float:
        if given < 0 or (given > 1 and given != int(given)):
            raise PydanticCustomError("share", "not a share of a resource")
        return given


Share = Annotated[float, ShareRule()]


class ReplicasRule:
    """Annotation of an `int | str` key: a fixed number of processes, or the least and the most of them."""

    allowed = "whole number >= 1, or a range of them, e.g. 1..4"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    @staticmethod
    def _check(given: int | str) -> int | str:
        least, most = limits(given)
        if not 1 <= least <= most:
            raise PydanticCustomError("replicas", "no number of processes")
        return given


def limits(replicas: int | str) -> tuple[int, int]:
    """The least and the most of a number of processes, or of a range "1..4"; (0, 0) if it is neither."""
    if isinstance(replicas, int):
        return replicas, replicas
    found = re.fullmatch(r"([0-9]{1,6})\.\.([0-9]{1,6})", replicas)
    return (int(found[1]), int(found[2])) if found else (0, 0)


Replicas = Annotated[int | str, ReplicasRule()]
