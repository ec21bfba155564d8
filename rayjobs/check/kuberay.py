"""Manifests for KubeRay, offline: the operator's schemas and rules, and the job in the entrypoint.

Owns what can be wrong with a manifest and what machines its worker groups are. Asks no cluster.
"""

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from rayjobs.check import nodes, schema
from rayjobs.check.nodes import NodeType
from rayjobs.check.report import Report

SPECS = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayCronJob": ("spec", "jobTemplate", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
"""Where each kind has its cluster."""
GPU = "nvidia.com/gpu"
GPU_LABELS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
PLACEHOLDERS = ("registry.example.org/", "s3://bucket/", "s3://my-bucket/", "0" * 64)
FACTORS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9}
CRON_FIELD = re.compile(r"(\*|[\w,*/-]+)")


def check(values: dict[str, Any], report: Report, where: str) -> list[NodeType] | None:
    """The machines of a manifest's worker groups; None where its parts are not of their types."""
    kind = values["kind"]
    report.find(schema.mistakes(values, schema.of_kuberay(kind)), where)
    if not schema.has_shape(values, schema.of_kuberay(kind)):
        return None
    report.find(_placeholders(values), where)
    job = _job_of(values)
    if job is not None:
        report.find(_job_rules(job), where)
    if kind == "RayCronJob":
        report.find(_schedule(values.get("spec") or {}), where)
    key, cluster = _cluster_of(values)
    if cluster is None:
        return []
    report.find(_cluster_rules(cluster), f"{where}{key}.")
    for name, use in _secrets(cluster):
        report.tell(f"not looked at: Secret {name} has to be in the namespace ({use})")
    return [node for group in _groups(cluster) if (node := _machine(group)) is not None]


def entrypoint(values: dict[str, Any]) -> str | None:
    """The command of a manifest's job, if it has one."""
    job = _job_of(values)
    return None if job is None else str(job.get("entrypoint") or "")


def arguments_of(command: str) -> list[str] | None:
    """What follows `rayjobs` or `python -m rayjobs` in a command; None where neither is in it.

    Raises ValueError for a command that no shell takes.
    """
    words = shlex.split(command)
    for number, word in enumerate(words):
        is_module = words[number - 2 : number] in (["python", "-m"], ["python3", "-m"])
        if word.rpartition("/")[2] == "rayjobs" and (number == 0 or is_module):
            return words[number + 1 :]
    return None


def _job_of(values: dict[str, Any]) -> dict[str, Any] | None:
    spec = values.get("spec") or {}
    if values["kind"] == "RayJob":
        return dict(spec)
    return dict(spec.get("jobTemplate") or {}) if values["kind"] == "RayCronJob" else None


def _cluster_of(values: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    found: Any = values
    path = SPECS[values["kind"]]
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return ".".join(path), found if isinstance(found, dict) else None


def _job_rules(job: dict[str, Any]) -> Iterator[str]:
    """What the operator refuses of a job, and what leaves a cluster that costs."""
    if job.get("rayClusterSpec") is None and not job.get("clusterSelector"):
        yield "rayClusterSpec: required, but not given (or clusterSelector)"
    if not job.get("shutdownAfterJobFinishes") and not job.get("clusterSelector"):
        yield "shutdownAfterJobFinishes is false: the cluster stays, and costs, after the job"
    for name, least in (
        ("backoffLimit", 0),
        ("ttlSecondsAfterFinished", 0),
        ("activeDeadlineSeconds", 1),
    ):
        number = job.get(name)
        if isinstance(number, int) and number < least:
            yield f"{name} is {number}; it must be at least {least}"


def _schedule(spec: dict[str, Any]) -> Iterator[str]:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    schedule, zone = str(spec.get("schedule") or ""), spec.get("timeZone")
    fields = schedule.split()
    is_named = schedule.startswith("@") and len(fields) == 1
    if not is_named and (len(fields) != 5 or not all(map(CRON_FIELD.fullmatch, fields))):
        yield f"spec.schedule is {schedule!r}; it must be five fields, as in 0 2 * * *"
    if zone is not None:
        try:
            ZoneInfo(str(zone))
        except (ZoneInfoNotFoundError, ValueError):
            yield f"spec.timeZone is {zone!r}, which is no time zone, such as Europe/Berlin"


def _cluster_rules(cluster: dict[str, Any]) -> Iterator[str]:
    installed, told = version("ray"), cluster.get("rayVersion")
    if told != installed:
        yield f"rayVersion is {told}, but the image of this version has Ray {installed}"
    scales = bool(cluster.get("enableInTreeAutoscaling"))
    is_v2 = scales and (cluster.get("autoscalerOptions") or {}).get("version") == "v2"
    names = [str(group.get("groupName")) for group in _groups(cluster)]
    for number, group in enumerate(_groups(cluster)):
        key, fewest = f"workerGroupSpecs.{number}", group.get("minReplicas")
        most = group.get("maxReplicas")
        if names[number] in names[:number]:
            yield f"{key}.groupName is {names[number]}, as another is; names must differ"
        if isinstance(fewest, int) and isinstance(most, int) and fewest > most:
            yield f"{key}.minReplicas is {fewest}, above its maxReplicas, {most}"
        if not scales and group.get("replicas", fewest) in (None, 0):
            yield f"{key}.replicas is 0, and without enableInTreeAutoscaling it stays so"
        yield from _pod_rules(f"{key}.template.spec", _pod(group), is_v2)
    head = cluster.get("headGroupSpec") or {}
    yield from _pod_rules("headGroupSpec.template.spec", _pod(head), is_v2)


def _pod_rules(key: str, pod: dict[str, Any], is_v2: bool) -> Iterator[str]:
    policy = pod.get("restartPolicy")
    if is_v2 and policy not in (None, "Never"):
        yield f"{key}.restartPolicy is {policy}; with autoscaler v2 it must be Never, or left out"
    volumes = {each.get("name"): each for each in pod.get("volumes") or ()}
    for kind in ("initContainers", "containers"):
        for number, container in enumerate(pod.get(kind) or ()):
            inner = f"{key}.{kind}.{number}"
            for mount in container.get("volumeMounts") or ():
                if mount.get("name") not in volumes:
                    yield f"{inner}.volumeMounts names {mount.get('name')!r}, which is no volume"
            yield from _resource_rules(inner, container.get("resources") or {})
    containers = pod.get("containers") or [{}]
    memory = [n for n, each in volumes.items() if _is_memory(each)]
    mounts = containers[0].get("volumeMounts") or ()
    if not any(m.get("mountPath") == "/dev/shm" and m.get("name") in memory for m in mounts):
        yield (
            f"{key}: no memory at /dev/shm, where Ray keeps objects: mount an emptyDir of medium "
            "Memory, since a container's own has 64 MiB"
        )


def _resource_rules(key: str, resources: dict[str, Any]) -> Iterator[str]:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    asked, allowed = requests.get(GPU), limits.get(GPU)
    if asked is not None and _amount(asked) != _amount(allowed):
        yield f"{key}.resources: {GPU} is {asked} in requests and {allowed} in limits; make it one"
    for name in ("cpu", "memory"):
        if name in limits and name in requests and _amount(requests[name]) > _amount(limits[name]):
            yield (
                f"{key}.resources.requests.{name} is {requests[name]}, above its limit, "
                f"{limits[name]}"
            )


def _secrets(cluster: dict[str, Any]) -> Iterator[tuple[str, str]]:
    auth = cluster.get("authOptions") or {}
    if auth.get("mode") == "token" and auth.get("secretName"):
        yield auth["secretName"], "its key auth_token"
    for group in [cluster.get("headGroupSpec") or {}, *_groups(cluster)]:
        for container in _pod(group).get("containers") or ():
            for source in container.get("envFrom") or ():
                named = source.get("secretRef") or {}
                if named.get("name") and not named.get("optional"):
                    yield named["name"], "envFrom"
            for variable in container.get("env") or ():
                named = (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
                if named.get("name") and not named.get("optional"):
                    yield named["name"], f"its key {named.get('key')}"


def _placeholders(value: Any, key: str = "") -> Iterator[str]:
    """Values of the template that were not edited; of the same in several places the first."""
    seen: set[str] = set()
    for inner, text in _texts(value, key):
        for start in PLACEHOLDERS:
            if start in text and start not in seen:
                seen.add(start)
                yield f"{inner} has {start:.40}, a placeholder of the template; put your own there"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _texts(part, f"{key}.{number}")


def _machine(group: dict[str, Any]) -> NodeType | None:
    containers = _pod(group).get("containers") or [{}]
    limits = (containers[0].get("resources") or {}).get("limits") or {}
    if "cpu" not in limits:
        return None
    labels = _pod(group).get("nodeSelector") or {}
    card = next((nodes.memory_of(str(labels[name])) for name in GPU_LABELS if name in labels), None)
    most = int(group.get("maxReplicas") or group.get("replicas") or 0)
    num_gpus = _amount(limits.get(GPU, 0))
    name = str(group.get("groupName"))
    return NodeType(name, float(int(_amount(limits["cpu"]) + 0.999)), num_gpus, most, card)


def _amount(quantity: Any) -> float:
    """A number as Kubernetes writes it; what is none counts as nothing."""
    found = re.fullmatch(r"([\d.]+)(m|[KMGT]i|[kMG])?", str(quantity))
    if found is None:
        return 0.0
    return float(found[1]) * (0.001 if found[2] == "m" else FACTORS[found[2] or ""])


def _is_memory(volume: dict[str, Any]) -> bool:
    return (volume.get("emptyDir") or {}).get("medium") == "Memory"


def _groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in cluster.get("workerGroupSpecs") or () if isinstance(each, dict)]


def _pod(group: dict[str, Any]) -> dict[str, Any]:
    return dict((group.get("template") or {}).get("spec") or {})
