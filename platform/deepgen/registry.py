"""What a setting can choose by name, and where the code of each name lies.

A registry holds import paths, not code, so that the settings can list and check names without importing torch, and a
name is written in one place only. Wherever a name is allowed, the path of something that is not registered
(`package.module:attribute`, in the submitted checkout or installed) is allowed as well: users add their own that way.

Left out: entry points of installed packages, which a submitted checkout does not have.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from deepgen.errors import UserError

T = TypeVar("T")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Registry(Mapping[str, Any]):
    """Names of one setting in the order in which `--help` lists them; `registry[name]` imports what the name means."""

    def __init__(self, key: str, paths: Mapping[str, str]) -> None:
        """key: the setting that chooses, for errors. paths: name -> "package.module:attribute"."""
        self.key, self._paths = key, dict(paths)

    def __getitem__(self, name: str) -> Any:
        if name not in self._paths:
            raise KeyError(name)
        return _attribute(self._paths[name], self.key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, given: str, key: str = "") -> str:
        """The import path of a name, or `given` itself where it is one. Imports nothing.

        key: the setting to blame where it is not the registry's own. Raises UserError for an unknown name.
        """
        if given in self._paths:
            return self._paths[given]
        if _PATH.fullmatch(given):
            return given
        raise UserError(
            f"{key or self.key}: got {given!r}{_hint(given, self)}; allowed: {', '.join(self)}, or a path "
            "package.module:NAME to your own"
        )

    def load(self, given: str, key: str = "") -> Any:
        """What a name or a path means. Raises UserError when there is no such name, module or attribute."""
        return _attribute(self.path(given, key), key or self.key)


ADVANTAGES = Registry(
    "algorithm.advantage",
    {
        "gdpo": "deepgen.algorithms.advantages:gdpo",
        "grpo": "deepgen.algorithms.advantages:grpo",
        "grpo_global_std": "deepgen.algorithms.advantages:grpo_global_std",
        "reinforcepp": "deepgen.algorithms.advantages:reinforcepp",
    },
)
POLICY_LOSSES = Registry(
    "algorithm.policy_loss",
    {
        "clipped_ratio": "actors.objectives.policy_losses:ClippedRatio",
        "diffusion_nft": "actors.objectives.policy_losses:NegativeAware",
    },
)
KL_FORMS = Registry(
    "algorithm.kl",
    {
        "velocity": "deepgen.algorithms.losses:velocity",
        "velocity_scaled": "deepgen.algorithms.losses:velocity_scaled",
        "latent_mean": "deepgen.algorithms.losses:latent_mean",
    },
)
SAMPLERS = Registry(
    "rollout.sampler",
    {
        "cps": "deepgen.diffusion.samplers:CPS",
        "flow_sde": "deepgen.diffusion.samplers:FLOW_SDE",
        "dance_sde": "deepgen.diffusion.samplers:DANCE_SDE",
        "ode": "deepgen.diffusion.samplers:ODE",
    },
)
SDE_WINDOWS = Registry(
    "rollout.sde_window",
    {
        "all": "deepgen.diffusion.trajectory:random_subset",
        "window": "deepgen.diffusion.trajectory:random_window",
        "first": "deepgen.diffusion.trajectory:first_window",
    },
)
REWARDS = Registry(
    "rewards.NAME.class",
    {
        "judge": "rewards.judge:JudgeReward",
        "ocr": "rewards.ocr:OcrReward",
        "clip": "rewards.clip:ClipReward",
        "aesthetic": "rewards.aesthetic:AestheticReward",
    },
)


def lookup(registry: Mapping[str, T], name: str, key: str) -> T:
    """Entry `name` of a plain dict. `key` is the setting that chose it, for the UserError that lists the names."""
    if name not in registry:
        raise UserError(f"{key}: got {name!r}{_hint(name, registry)}; allowed: {', '.join(registry)}")
    return registry[name]


def _hint(given: str, names: Mapping[str, Any]) -> str:
    close = get_close_matches(str(given), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@cache
def _attribute(path: str, key: str) -> Any:
    """What an import path means. UserError naming `key` when the module or the attribute is missing."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{key}: there is no module {error.name!r} for {path!r}; allowed: a module of this checkout or an "
                "installed one"
            ) from error
        raise  # the module is there and lacks one of its own imports: its traceback says which
    if not hasattr(module, name):
        known = [found for found in vars(module) if not found.startswith("_")]
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {f'{module_name}:{close[0]}'!r}?" if close else ""
        raise UserError(f"{key}: module {module_name!r} has no {name!r}{hint}")
    return getattr(module, name)
