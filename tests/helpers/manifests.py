"""Checks Kubernetes manifests of Ray: against KubeRay's schemas, and against rules that no schema has.

A validator of JSON schemas alone would let misspelt fields through: the schemas do not forbid unknown ones, the API
server drops them.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "kuberay"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
SECRET_NAME = re.compile(r"TOKEN(?!IZER)|PASSWORD|SECRET|ACCESS_KEY|CREDENTIAL|API_KEY", re.IGNORECASE)
# A long random word, or what keys of clouds and Git hosts begin with.
SECRET_VALUE = re.compile(
    r"\b(?!f{40})[A-Za-z0-9+/]{40,}\b|\b(AKIA|ghp_|hf_|sk-|xox[bp]-)[A-Za-z0-9]{8,}|-----BEGIN|//[^/\s:]+:[^@\s]+@"
)


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind, version v1."""
    packed = FOLDER / f"ray.io_{KINDS[kind]}.yaml.gz"
    crd = yaml.load(gzip.decompress(packed.read_bytes()), yaml.CSafeLoader)
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def schema_faults(manifest: Mapping[str, Any]) -> list[str]:
    """What the schema of its kind says against a manifest; unknown fields are faults."""
    if manifest.get("apiVersion") != "ray.io/v1":
        return [f"apiVersion: got {manifest.get('apiVersion')!r}; allowed: ray.io/v1"]
    return list(_faults(schema_of(manifest["kind"]), manifest, ""))


def _faults(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path}: {value!r} is neither a number nor a string"
        elif "pattern" in schema and not re.search(schema["pattern"], str(value)):
            yield f"{path}: {value!r} is no quantity"
        return
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (kind != "boolean" and isinstance(value, bool))):
        yield f"{path}: {value!r} is no {kind}"
        return
    if value not in schema.get("enum", [value]):
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{path}: {value!r} is out of range"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(schema["items"], item, f"{path}[{index}]")
    elif isinstance(value, dict):
        yield from _object_faults(schema, value, path)


def _object_faults(schema: Mapping[str, Any], value: Mapping[str, Any], path: str) -> Iterator[str]:
    known, others = schema.get("properties"), schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path}: {name!r} is missing"
    for name, item in value.items():
        inner = f"{path}.{name}".lstrip(".")
        if known and name in known:
            yield from _faults(known[name], item, inner)
        elif isinstance(others, dict):
            yield from _faults(others, item, inner)
        elif known and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{inner}: unknown field"


def cluster_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The RayCluster's spec in a manifest of any kind."""
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def pods_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All pods that a manifest has made, by what they are for."""
    cluster = cluster_of(manifest)
    pods = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    pods |= {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    if submitter := manifest["spec"].get("submitterPodTemplate"):
        pods["submitter"] = submitter["spec"]
    return pods


def rule_faults(manifest: Mapping[str, Any], ray_version: str) -> list[str]:
    """What the operator or our own rules say against a manifest."""
    return [
        *_cluster_faults(manifest, ray_version),
        *_job_faults(manifest),
        *_pod_faults(manifest),
        *secrets_in(manifest),
    ]


def _cluster_faults(manifest: Mapping[str, Any], ray_version: str) -> Iterator[str]:
    cluster = cluster_of(manifest)
    if cluster.get("rayVersion") != ray_version:
        yield f"rayVersion: got {cluster.get('rayVersion')!r}; the lock has {ray_version!r}"
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token":  # without the mode the operator makes a token and gives it to nobody
        yield "authOptions.mode: not token"
    if auth.get("enableK8sTokenAuth") and (auth.get("secretName") or manifest["kind"] == "RayJob"):
        yield "authOptions.enableK8sTokenAuth: neither with secretName nor in a RayJob"
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version: not v2, or autoscaling is off"
    head = cluster["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "headGroupSpec.rayStartParams.num-cpus: not 0, so actors come to the head"
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "headGroupSpec: the dashboard can be reached from outside"
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas are not between least and most"
        if group.get("labels", {}).keys() != {"node-pool", "market"}:
            yield f"{group['groupName']}.labels: not node-pool and market"


def _job_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    spec = manifest["spec"]
    if manifest["kind"] != "RayJob":
        return
    if spec.get("backoffLimit", 0) <= 0 or "clusterSelector" in spec:
        yield "backoffLimit: a lost driver ends the run; it wants a number above 0 and no clusterSelector"
    if not {"--resume", "run.dir=/shared/runs"} <= set(spec["entrypoint"].split()):
        yield "entrypoint: an attempt does not go on with the one before"


def _pod_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, pod in pods_of(manifest).items():
        if not pod.get("securityContext", {}).get("runAsNonRoot"):
            yield f"{name}: may run as root"
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        for container in pod["containers"]:
            inner = container.get("securityContext", {})
            if not inner.get("readOnlyRootFilesystem") or inner.get("allowPrivilegeEscalation", True):
                yield f"{name}: its root can be written to, or privileges can be gained"
            mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", ())}
            if "emptyDir" not in mounts.get("/tmp", {}):
                yield f"{name}: no emptyDir at /tmp"
            if any(not volume for volume in mounts.values()):
                yield f"{name}: mounts a volume that is not there"
            if name == "submitter":
                continue
            if mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
                yield f"{name}: no emptyDir of memory at /dev/shm"
            if not {"livenessProbe", "readinessProbe"} <= container.keys():
                yield f"{name}: no probes"


def secrets_in(manifest: Mapping[str, Any]) -> list[str]:
    """Values that look like secrets, or stand where one belongs; references are none."""
    return list(_secrets(manifest, ""))


def _secrets(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        if SECRET_NAME.search(str(value.get("name", ""))) and "value" in value:
            yield f"{path}: {value['name']} has its value here; allowed: valueFrom"
        for name, item in value.items():
            yield from _secrets(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _secrets(item, f"{path}[{index}]")
    elif isinstance(value, str) and SECRET_VALUE.search(value):
        yield f"{path}: looks like a secret"
