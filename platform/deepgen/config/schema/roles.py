"""Where the processes of a run may lie: `cluster.roles`, by role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from deepgen.config.schema.choices import Share
from deepgen.config.schema.section import Section

LEARNER, ROLLOUT, STREAM, REWARD = "learner", "rollout", "stream", "reward"
ROLES = (LEARNER, ROLLOUT, STREAM, REWARD)  # and the name of any reward pool
# Ray's rules for labels; values may also be "!v", "in(a,b)" and "!in(a,b)".
_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
_LABEL = rf"^({_WORD}/)?{_WORD}$"
_VALUE = rf"^(!?{_WORD}|!?in\({_WORD}(, ?{_WORD})*\))$"
Label = Annotated[str, Field(pattern=_LABEL, max_length=200)]
LabelValue = Annotated[str, Field(pattern=_VALUE, max_length=500)]


class RoleSettings(Section):
    """What one process of a role asks of a node. None: the role's default."""

    about: ClassVar[str] = "one process of a role"
    cpus: Share | None = None
    gpus: Share | None = None
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")] = ""
    labels: dict[Label, LabelValue] = Field(default_factory=dict)


def role_fault(name: str, given: RoleSettings, pools: Sequence[str]) -> str | None:
    """Why a role cannot be as given, starting with its key; None if it can. pools: names of the reward pools."""
    key = f"cluster.roles.{name}"
    if name not in (*ROLES, *pools):
        return f"{key}: unknown role {name!r}; allowed: {', '.join(ROLES)}, or a reward pool ({', '.join(pools)})"
    if given.gpus is not None and name not in (LEARNER, ROLLOUT):
        here = "none" if name == STREAM else f"rewards.{'NAME' if name == REWARD else name}.gpus"
        return f"{key}.gpus: got {given.gpus:g}; allowed: for {LEARNER} and {ROLLOUT}, here {here}"
    if given.gpus == 0:
        return f"{key}.gpus: got 0; allowed: above 0; on a cluster without any none are asked for"
    return None
