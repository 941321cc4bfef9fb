"""Every manifest of clusters/kuberay/ holds to KubeRay's schema and rules; each kind of mistake is found."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepgen.config import load_settings
from deepgen.config.recipes import find_recipe
from tests.helpers.manifests import cluster_of, pods_of, rule_faults, schema_faults, secrets_in

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "clusters" / "kuberay").glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader))


RAY = {
    f"{file.name}:{one['kind']}": one for file in FILES for one in documents(file) if one["apiVersion"] == "ray.io/v1"
}


@pytest.fixture(scope="module")
def ray_version() -> str:
    found = re.search(r"^ray==(.+)$", (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1]


def test_there_is_a_file_of_each_kind() -> None:
    assert {one["kind"] for one in RAY.values()} == {"RayCluster", "RayJob", "RayService"}


@pytest.mark.parametrize("name", RAY)
def test_a_manifest_holds_to_the_schema_and_the_rules(name: str, ray_version: str) -> None:
    assert schema_faults(RAY[name]) == []
    assert rule_faults(RAY[name], ray_version) == []


@pytest.mark.parametrize("name", RAY)
def test_the_learner_is_on_demand_and_rollouts_are_spot(name: str) -> None:
    groups = {group["groupName"]: group for group in cluster_of(RAY[name])["workerGroupSpecs"]}
    for group, market in {"learner": "on-demand", "rollout": "spot"}.items():
        if group in groups:
            assert groups[group]["labels"] == {"node-pool": group, "market": market}
            assert groups[group]["template"]["spec"]["nodeSelector"] == {"deepgen/market": market}
    assert "rollout" in groups or RAY[name]["kind"] == "RayService"


@pytest.mark.parametrize("name", RAY)
def test_every_volume_claim_is_in_a_file_here(name: str) -> None:
    claims = {one["metadata"]["name"] for file in FILES for one in documents(file) if "Claim" in one["kind"]}
    volumes = [volume for pod in pods_of(RAY[name]).values() for volume in pod["volumes"]]
    assert {one["persistentVolumeClaim"]["claimName"] for one in volumes if "persistentVolumeClaim" in one} <= claims


@pytest.mark.parametrize("name", [name for name in RAY if name.endswith("RayJob")])
def test_the_settings_of_an_entrypoint_exist(name: str) -> None:
    python, program, *arguments = shlex.split(RAY[name]["spec"]["entrypoint"])
    assert (python, program) == ("python", "/opt/deepgen/stages/rl.py")
    recipe = arguments[arguments.index("--recipe") + 1]
    settings = load_settings(find_recipe(recipe), [one for one in arguments if "=" in one])
    assert "--resume" in arguments and str(settings.run.dir) == "/shared/runs"
    paths = [settings.model.weights, settings.data.train, settings.data.heldout, settings.data.prompts]
    paths += [path for name in settings.rewards.used() for path in settings.rewards.pools[name].input_paths().values()]
    assert [path for path in paths if not str(path).startswith("/shared/")] == []


def test_the_applications_of_the_service_can_be_built() -> None:
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    from stages.scoring import reward_application

    (service,) = (one for one in RAY.values() if one["kind"] == "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    given = {one["name"] for pod in pods_of(service).values() for box in pod["containers"] for one in box["env"]}
    for application in config.applications:
        assert import_attr(application.import_path) is reward_application.build
        assert reward_application.ApplicationArgs.model_validate(application.args).token_env in given
        assert application.route_prefix == f"/{application.name}"


# -- the checks can fail ---------------------------------------------------------------------------------------------


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets what a path of names and numbers leads to; None removes it."""

    def apply(manifest: dict[str, Any]) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        place: Any = manifest["spec"]
        for part in way:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return apply


WORKER = "rayClusterSpec/workerGroupSpecs/0"
POD = f"{WORKER}/template/spec"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("backofLimit", 3, "spec.backofLimit: unknown field"),
        (f"{POD}/containers/0/volumeMount", [], "volumeMount: unknown field"),
        (f"{WORKER}/maxReplicas", "2", "'2' is no integer"),
        (f"{WORKER}/groupName", None, "'groupName' is missing"),
        ("rayClusterSpec/autoscalerOptions/version", "v3", "is none of"),
        (f"{POD}/containers/0/resources/limits/memory", "1 GB", "is no quantity"),
        (f"{POD}/containers/0/livenessProbe/httpGet/port", True, "neither a number nor a string"),
    ],
)
def test_a_fault_of_the_schema_is_found(path: str, value: Any, said: str) -> None:
    manifest = copy.deepcopy(RAY["job.yaml:RayJob"])
    change(path, value)(manifest)
    assert any(said in fault for fault in schema_faults(manifest)), schema_faults(manifest)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("rayClusterSpec/rayVersion", "2.59.0", "rayVersion: got '2.59.0'"),
        ("rayClusterSpec/authOptions/mode", None, "authOptions.mode"),
        ("rayClusterSpec/authOptions/enableK8sTokenAuth", True, "enableK8sTokenAuth"),
        ("rayClusterSpec/autoscalerOptions/version", "v1", "autoscalerOptions.version"),
        ("rayClusterSpec/headGroupSpec/serviceType", "LoadBalancer", "from outside"),
        ("rayClusterSpec/headGroupSpec/rayStartParams", {}, "num-cpus"),
        (f"{WORKER}/replicas", 9, "replicas are not between"),
        (f"{WORKER}/labels", {"pool": "learner"}, "labels: not node-pool and market"),
        ("backoffLimit", 0, "backoffLimit"),
        ("entrypoint", "python stages/rl.py", "does not go on"),
        (f"{POD}/securityContext", {}, "may run as root"),
        (f"{POD}/containers/0/securityContext/readOnlyRootFilesystem", False, "can be written to"),
        (f"{POD}/containers/0/livenessProbe", None, "no probes"),
        (f"{POD}/volumes/1/emptyDir", {}, "/dev/shm"),
        (f"{POD}/containers/0/env", [{"name": "REWARD_TOKEN", "value": "x"}], "REWARD_TOKEN has its value here"),
        (f"{POD}/containers/0/env", [{"name": "PLAIN", "value": "AKIA" + "A" * 16}], "looks like a secret"),
        ("entrypoint", "python x --resume run.dir=/shared/runs tracking.uri=https://me:pw@host", "like a secret"),
    ],
)
def test_a_broken_rule_is_found(path: str, value: Any, said: str, ray_version: str) -> None:
    manifest = copy.deepcopy(RAY["job.yaml:RayJob"])
    change(path, value)(manifest)
    found = rule_faults(manifest, ray_version)
    assert any(said in fault for fault in found), found


def test_a_reference_to_a_secret_is_none() -> None:
    assert secrets_in({"env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "a", "key": "token"}}}]}) == []
