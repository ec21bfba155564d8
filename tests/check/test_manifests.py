"""The manifests for KubeRay: valid for the operator, alike, and fitting what they speak to."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kuberay import render
from rayjobs.check import kuberay, schema

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
OPERATORS = ROOT.parent / "shared" / "data" / "kuberay"
JOBS = ("generate", "dreambooth", "nightly")


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((KUBERAY / f"{name}.yaml").read_text()))


def cluster_of(name: str) -> Any:
    spec = load(name)[0]["spec"]
    spec = spec.get("jobTemplate", spec)
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(cluster: Any) -> list[Any]:
    return [each["template"] for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", render.FILES)
def test_shared_parts_are_those_of_their_sources(name: str) -> None:
    assert render.rendered(name) == (KUBERAY / name).read_text(), "run make kuberay"
    assert cluster_of(name.removesuffix(".yaml")) == cluster_of("cluster")


def test_serving_s_configuration_is_the_very_one() -> None:
    served = yaml.safe_load(load("serve")[0]["spec"]["serveConfigV2"])
    assert served == yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    ports = pods(cluster_of("serve"))[1]["spec"]["containers"][0]["ports"]
    assert served["http_options"]["port"] in [port["containerPort"] for port in ports]


@pytest.mark.parametrize("name", [*JOBS, "serve", "cluster"])
def test_the_operator_takes_them(name: str) -> None:
    [values] = load(name)
    assert list(schema.mistakes(values, schema.of_kuberay(values["kind"]))) == []


def test_schemas_are_the_operator_s_own() -> None:
    if not OPERATORS.is_dir():
        pytest.skip(f"the operator's schemas are not at hand ({OPERATORS})")
    for kind in kuberay.SPECS:
        own, theirs = (
            json.loads(gzip.decompress((folder / f"{kind}.v1.schema.json.gz").read_bytes()))
            for folder in (schema.SCHEMAS, OPERATORS)
        )
        assert own == theirs


@pytest.mark.parametrize("name", JOBS)
def test_a_job_may_fail_and_leaves_nothing(name: str) -> None:
    spec = load(name)[0]["spec"]
    job = spec.get("jobTemplate", spec)
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0
    assert job["ttlSecondsAfterFinished"] < 3600
    # Nights do not meet, whether the deadline is of each try or of all.
    if name == "nightly":
        assert job["activeDeadlineSeconds"] * (job["backoffLimit"] + 1) < 86_400
    words = kuberay.arguments_of(job["entrypoint"])
    assert words is not None
    assert (ROOT / words[1].replace("/opt/rayjobs/", "")).is_file()


def test_what_selects_pods_finds_them() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(cluster_of("cluster"))]
    [account, budget] = load("setup")
    wanted = dict(budget["spec"]["selector"]["matchLabels"])
    assert wanted.pop("ray.io/node-type") == "head"  # which the operator adds
    [monitor] = load("monitoring")
    for selected in (wanted, monitor["spec"]["selector"]["matchLabels"]):
        assert all(selected.items() <= each.items() for each in labels)
    for pod in pods(cluster_of("cluster")):
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports
        assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
    [queue] = load("queue")
    queues = {load(name)[0]["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
              for name in ("generate", "dreambooth", "cluster")}  # fmt: skip
    assert queues == {queue["metadata"]["name"]}


def test_pods_are_those_of_the_image() -> None:
    """The Dockerfile's user and folders; a new node's folder of models becomes the user's."""
    text = (ROOT / "Dockerfile").read_text()
    for pod in pods(cluster_of("cluster")):
        user = pod["spec"]["securityContext"]["runAsUser"]
        assert text.count(f"\nUSER {user}\n") == 2
    assert "WORKDIR /opt/rayjobs\n" in text
    worker = pods(cluster_of("cluster"))[1]["spec"]
    env = {each["name"]: each["value"] for each in worker["containers"][0]["env"]}
    assert env["RAYJOBS_CACHE"].startswith("/models/")
    [prepare] = worker["initContainers"]
    assert prepare["command"] == ["chown", f"{user}:{user}", "/models"]


def test_the_image_has_the_versions_of_a_clone() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = text.split("\nFROM ")[2:]
    assert [stage.partition("\n")[0].rpartition(" ")[2] for stage in stages] == ["gpu", "cpu"]
    for stage in stages:
        before, _, after = stage.partition("COPY . .")
        assert "-c constraints.txt -r pyproject.toml" in before
        assert "--no-deps ." in after  # the code last: what it needs is there
    uv = text.partition("astral-sh/uv:")[2].split()[0]
    assert f"/uv/{uv}/" in (ROOT / "cluster.yaml").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert {"pyproject.toml", "constraints.txt", "README.md", "rayjobs", "serve", "configs"} <= kept


def merged(values: Any, patch: Any) -> Any:
    """A JSON merge patch, as kustomize applies to kinds that are not Kubernetes' own."""
    if not isinstance(values, dict) or not isinstance(patch, dict):
        return patch
    return values | {key: merged(values.get(key), value) for key, value in patch.items()}


def test_serving_with_redis_is_taken_and_finds_it() -> None:
    [overlay], [patch] = load("redis/kustomization"), load("redis/gcs")
    assert [each["path"] for each in overlay["patches"]] == ["gcs.yaml"]
    assert all((KUBERAY / "redis" / each).exists() for each in overlay["resources"])
    [base], [serve] = load("kustomization"), load("serve")
    assert "serve.yaml" in base["resources"]
    assert patch["metadata"]["name"] == serve["metadata"]["name"]
    service = merged(serve, patch)
    assert list(schema.mistakes(service, schema.of_kuberay("RayService"))) == []
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    [found, server] = load("redis/redis")
    [port] = found["spec"]["ports"]
    assert options["redisAddress"] == f"redis://{found['metadata']['name']}:{port['port']}"
    pod = server["spec"]["template"]
    assert found["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    [password] = pod["spec"]["containers"][0]["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    # A pod is a pod: the operator's schema has them, too.
    [cluster] = load("cluster")
    cluster["spec"]["headGroupSpec"]["template"] = pod
    assert list(schema.mistakes(cluster, schema.of_kuberay("RayCluster"))) == []
