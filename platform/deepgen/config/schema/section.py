"""What a section of the settings is made of: `Section`, and `setting` for each of its keys."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, meaning: str, *, unit: str = "", allowed: str = "", **limits: Any) -> Any:
    """A leaf key: default, one-sentence meaning, unit, and pydantic limits (ge, gt, le, lt, pattern, multiple_of).

    allowed: what the key accepts, in words, where type and limits do not say it.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "allowed": allowed}, **limits)


class Section(BaseModel):
    """Base of all sections: closed, immutable, strict (a recipe's true is not 1, its "10" not 10)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )
    about: ClassVar[str] = ""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled settings (Ray arguments) find their files again in the process that unpacks them.
        return type(self).model_validate, (self.model_dump(),)
