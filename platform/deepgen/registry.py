"""Names to functions: every algorithm a setting can choose lives in a plain dict, looked up here.

To add one, write the function and put it in its dict (`ADVANTAGES`, `KL_FORMS`, `SAMPLERS`); nothing else has to know.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from deepgen.errors import UserError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, key: str) -> T:
    """Entry called `name`. `key` is the setting that chose it, for the error (UserError) that lists what is allowed."""
    if name not in registry:
        close = get_close_matches(str(name), registry, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"{key}: got {name!r}{hint}; allowed: {', '.join(registry)}")
    return registry[name]
