"""A reward as a Ray Serve application, for a Serve config file (`serve deploy`, KubeRay's RayService).

    applications:
      - name: clip
        import_path: stages.scoring.reward_application:build
        route_prefix: /clip
        args: {rewards: clip, token_env: REWARD_TOKEN, overrides: [rewards.clip.path=/shared/weights/clip]}

Such a file starts the service without a program of ours; `stages/serve_rewards.py` does it with one.
"""

# Without `annotations` from __future__: Serve reads the type of `build`'s argument to convert `args`.
from argparse import Namespace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from actors.reward_service import Hosting, reward_application
from deepgen.cluster.resources import pool_placement
from deepgen.config import UserError
from rewards.remote.caller import read_token
from stages.scoring.reward_choice import chosen


class ApplicationArgs(BaseModel):
    """rewards, recipe, overrides: as the options of `stages/serve_rewards.py`, for one reward.

    token_env: the environment variable with the token that callers have to send. Serve's proxy takes calls from other
    machines, so it has no default. max_replicas: while calls queue. gpus: whether the cluster has GPUs.
    """

    model_config = ConfigDict(extra="forbid")

    rewards: str
    token_env: str
    recipe: str | None = None
    overrides: list[str] = Field(default_factory=list)
    max_replicas: int = Field(default=1, ge=1)
    gpus: bool = True


def build(args: ApplicationArgs) -> Any:
    """The application. Raises UserError for what is unknown, for missing files, and if the token is not there."""
    given = Namespace(rewards=args.rewards, recipe=args.recipe, overrides=args.overrides, address=None)
    settings, pools = chosen(given)
    if len(pools) != 1:
        raise UserError(f"rewards: got {args.rewards!r}; allowed: one reward an application")
    if pools[0].environment:
        raise UserError(f"{pools[0].dotted('environment')}: nodes that join later lack it; allowed: one of the image's")
    hosting = Hosting("", 0, read_token(args.token_env, "token_env"), args.max_replicas)
    return reward_application(pools[0], hosting, pool_placement(settings.cluster, pools[0], gpus=args.gpus))
