"""Building blocks of the settings: `Section` for a section and `setting` for each of its keys."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, meaning: str, *, unit: str = "", allowed: str = "", **limits: Any) -> Any:
    """A leaf key: default, one-sentence meaning, unit, and pydantic limits (ge, gt, le, lt, pattern, multiple_of).

    allowed: the allowed values in words, needed if type and limits do not tell them.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "allowed": allowed}, **limits)


class Section(BaseModel):
    """Base of all sections. No other keys, no changes, no type conversion (true is not 1, "10" is not 10)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )
    about: ClassVar[str] = ""

    def __reduce__(self) -> tuple[Any, ...]:
        # Settings are pickled as Ray arguments. Validating again resolves their paths in the receiving process.
        return type(self).model_validate, (self.model_dump(),)
