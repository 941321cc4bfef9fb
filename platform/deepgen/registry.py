"""The names that settings can choose from, and the import path of the code behind each name.

A registry holds import paths, not code. So the settings can list and check names without importing torch, and each name
is written in one place only. Users add their own code by its path: wherever a setting accepts a name, it also accepts
`package.module:attribute`, from the submitted checkout or an installed package.

Left out: entry points of installed packages, because a submitted checkout has none.
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
    """The names of one setting, in the order in which `--help` lists them. `registry[name]` imports the object."""

    def __init__(self, key: str, paths: Mapping[str, str]) -> None:
        """key: the setting, for error messages. paths: name -> "package.module:attribute"."""
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
        """The import path of a name, or `given` if it already is a path. Imports nothing.

        key: setting that error messages name; default: the registry's own. Raises UserError for an unknown name.
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
        """The object behind a name or a path. Raises UserError if the name, module or attribute is missing."""
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
        "remote": "rewards.remote.client:RemoteReward",
        "pickscore": "rewards.preference.pickscore:PickScoreReward",
        "hpsv2": "rewards.preference.hpsv2:HpsV2Reward",
        "hpsv3": "rewards.preference.hpsv3:HpsV3Reward",
        "image_reward": "rewards.preference.image_reward:ImageReward",
        "clip_direction": "rewards.editing.direction:ClipDirectionReward",
        "clip_source": "rewards.editing.direction:ClipSourceReward",
        "kept": "rewards.editing.kept:KeptReward",
        "vlm_judge": "rewards.judging.vlm_judge:VlmJudge",
        "vlm_duel": "rewards.judging.vlm_duel:VlmDuel",
    },
)


def lookup(registry: Mapping[str, T], name: str, key: str) -> T:
    """Entry `name` of a plain dict. Raises UserError with `key`, the setting that chose `name`, and the known names."""
    if name not in registry:
        raise UserError(f"{key}: got {name!r}{_hint(name, registry)}; allowed: {', '.join(registry)}")
    return registry[name]


def _hint(given: str, names: Mapping[str, Any]) -> str:
    close = get_close_matches(str(given), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@cache
def _attribute(path: str, key: str) -> Any:
    """The object at an import path. Raises UserError naming `key` if the module or the attribute is missing."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{key}: there is no module {error.name!r} for {path!r}; allowed: a module of this checkout or an "
                "installed one"
            ) from error
        raise  # the module exists but one of its imports is missing; the traceback names it
    if not hasattr(module, name):
        known = [found for found in vars(module) if not found.startswith("_")]
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {f'{module_name}:{close[0]}'!r}?" if close else ""
        raise UserError(f"{key}: module {module_name!r} has no {name!r}{hint}")
    return getattr(module, name)
