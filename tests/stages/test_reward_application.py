"""Rewards as applications of a Serve config file: what such a file says is what is deployed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deepgen.errors import UserError

BRIGHTNESS = {"rewards": "examples.own_reward.brightness:Brightness", "token_env": "REWARD_TOKEN", "gpus": False}


def built(**args: Any) -> Any:
    """As Serve's controller does it for `import_path` and `args`."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from stages.scoring.reward_application import build

    return call_user_app_builder_with_args_if_necessary(build, BRIGHTNESS | args)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "a-long-token-of-callers-0123456789")


@pytest.mark.usefixtures("token")
def test_an_application_has_the_settings_of_the_file() -> None:
    from actors.reward_service import digest

    application = built(max_replicas=3, overrides=["rewards.brightness.wanted=0.9", "cluster.roles.brightness.cpus=2"])
    deployment = application._bound_deployment
    pool, token_hash, own = deployment.init_args
    assert (pool.pool_name, pool.wanted, own) == ("brightness", 0.9, None)
    assert token_hash == digest("a-long-token-of-callers-0123456789")
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert deployment.ray_actor_options["num_cpus"] == 2 and deployment.ray_actor_options["num_gpus"] == 0


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"rewards": "clipp"}, "got 'clipp'; did you mean 'clip'"),
        (
            {"rewards": "ocr,aesthetic", "overrides": ["rewards.aesthetic.path=assets/tiny/rewards/aesthetic"]},
            "one reward",
        ),
        ({"token_env": "NO_SUCH_TOKEN"}, "token_env"),
        ({"overrides": ["rewards.brightness.environment=[x==1]"]}, "rewards.brightness.environment: nodes that join"),
    ],
)
def test_what_cannot_be_served_is_one_line(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        built(**args)


@pytest.mark.parametrize("args", [{"max_replica": 2}, {"max_replicas": 0}])
def test_a_misspelt_or_impossible_argument_is_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(args))):
        built(**args)


def test_a_token_is_not_optional() -> None:
    from stages.scoring.reward_application import ApplicationArgs

    with pytest.raises(ValidationError, match="token_env"):
        ApplicationArgs.model_validate({"rewards": "ocr"})
