"""What MLflow's pages show of a run: names and settings in its form, and a view that begins with what matters.

MLflow orders charts by the names of their metrics, unless a view orders them. Views belong to an experiment, and an
address opens one. The address also says that this is training; without it, MLflow 3.17 opens its pages for apps of
language models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from pydantic_core import PydanticUndefined

from deepgen.config.schema.pools import pool_keys

if TYPE_CHECKING:
    from deepgen.config.settings import Settings

MAX_NAME = 250
# What MLflow refuses in a name: other characters than these, and what a path could be written without: slashes at an
# end or in a row, and parts of only dots. The first choice is what reads like an escape.
_REFUSED = re.compile(r"_(?=x[0-9a-f]{4})|[^\w./ -]|^/|/(?=/|\Z)|(?<![^/])\.{1,2}(?![^/])|^\.(?=\.)")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def mlflow_name(name: str, *, ascii_only: bool = False) -> str:
    """A name that MLflow takes for a parameter, metric or tag, and with `ascii_only` for a picture.

    A character that it refuses becomes `_x002f_`, its code point in hexadecimal digits, as in spreadsheets' XML. So
    different names stay different, and the original can be told. A name above MAX_NAME is cut and ends in a hash.
    """
    safe = _REFUSED.sub(_escaped, name)
    safe = _NOT_ASCII.sub(_escaped, safe) if ascii_only else safe
    return fitting(safe, name)


class Names:
    """The names of one kind (metrics, parameters, tags) in one run: `mlflow_name`, and none that differ by case only.

    Databases that ignore case (MySQL, SQL Server, as they are set up) refuse the second of `Loss` and `loss`. It gets
    the letters that differ as their codes, so that it can be read back, too. taken: MLflow's names that are there.
    """

    def __init__(self, taken: Iterable[str] = (), *, ascii_only: bool = False) -> None:
        self.cut: dict[str, str] = {}  # names that were too long: MLflow's, and the original
        self._ascii_only = ascii_only
        self._first = {name.lower(): name for name in taken}

    def __call__(self, name: str) -> str:
        safe = mlflow_name(name, ascii_only=self._ascii_only)
        first = self._first.setdefault(safe.lower(), safe)
        if first != safe:
            pairs = zip(first, safe, strict=True)
            safe = fitting("".join(b if a == b else _code(b) for a, b in pairs), name)
        if len(safe) == MAX_NAME and safe.endswith(_digest(name)):
            self.cut[safe] = name
        return safe


def fitting(safe: str, name: str) -> str:
    """A name of at most MAX_NAME characters: `safe`, or its beginning and a hash of the original `name`."""
    if len(safe) <= MAX_NAME:
        return safe
    digest = _digest(name)
    return f"{safe[: MAX_NAME - len(digest) - 1]}_{digest}"


def storable(text: str) -> str:
    """A value of a parameter or tag without what databases refuse: zeros (PostgreSQL), halves of surrogate pairs."""
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _escaped(match: re.Match[str]) -> str:
    return "".join(map(_code, match[0]))


def _code(character: str) -> str:
    return f"_x{ord(character):04x}_"


# ---------------------------------------------------------------- settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"run.seed": "0", ...}, with all values as text."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def changed_settings(settings: Settings) -> dict[str, str]:
    """The settings that differ from the defaults, like `flatten`. A mapping that has other keys is there as a whole."""
    return _changed(settings.model_dump(), default_settings(settings), "")


def default_settings(settings: Settings) -> dict[str, Any]:
    """The content of settings that set nothing; with the pools of `settings`, each with the defaults of its class."""
    usual = type(settings)()
    content = usual.model_dump()
    for name, pool in settings.rewards.pools.items():
        if type(pool) is not type(usual.rewards.pools.get(name)):
            fields = pool_keys(type(pool))
            content["rewards"][name] = {
                key: None if field.default is PydanticUndefined else field.default for key, field in fields.items()
            }
    return content


def _changed(now: Mapping[str, Any], usual: Mapping[str, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in now.items():
        before = usual.get(key)
        if value == before:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping) and value.keys() == before.keys():
            found |= _changed(value, before, f"{prefix}{key}.")
        else:
            found |= flatten({key: value}, prefix)
    return found


# ---------------------------------------------------------------- views


_LINE: dict[str, Any] = {  # a chart as MLflow makes one; without these it would smooth it, for example
    "type": "LINE",
    "lineSmoothness": 0,
    "xAxisKey": "step",
    "xAxisScaleType": "linear",
    "yAxisKey": "metric",
    "scaleType": "linear",
    "range": {},
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}
_PICTURES = {"type": "IMAGE", "imageKeys": ["samples"], "step": 0, "runsCountToCompare": 10, "showRunParams": False}


def _view(metrics: list[str], sections: list[str]) -> str:
    """A view in the form of MLflow's `mlflow.sharedViewState`: charts of these metrics and the pictures, then sections.

    All other sections follow. MLflow fills the sections itself, and leaves out charts that have no data.
    """
    first = "at first sight"
    cards = [_LINE | {"metricKey": name, "uuid": name} for name in metrics] + [_PICTURES | {"uuid": "samples"}]
    view = {
        "compareRunCharts": [card | {"metricSectionId": first} for card in cards],
        "compareRunSections": [{"uuid": name, "name": name, "display": True} for name in (first, *sections)],
        "isAccordionReordered": True,  # keep this order
    }
    return json.dumps(view)


_VIEWS = {
    "rl": _view(["reward/total", "eval/total"], ["reward", "eval", "advantage"]),
    "supervised": _view(["loss/flow_matching", "heldout_loss/all"], ["loss", "heldout_loss"]),
}
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # training; 3.17 goes by the address alone
    **{f"mlflow.sharedViewState.{key}": view for key, view in _VIEWS.items()},
}


def page_address(experiment_id: str, stage: str) -> str:
    """The part of an address after the server's: all runs of an experiment, in the stage's view."""
    view = stage if stage in _VIEWS else "supervised"
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": view}
    return f"#/experiments/{experiment_id}/runs?{urlencode(query)}"
