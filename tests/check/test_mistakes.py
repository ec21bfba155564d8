"""Mistakes planted in manifests, cluster files and configurations: each is found, and it alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.check import files
from rayjobs.cli import main

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
DEMO = ROOT / "configs" / "demo" / "generate.yaml"
SDXL = ROOT / "configs" / "generate.yaml"
GONE = object()
HEAD_POD = "headGroupSpec.template.spec"
WORKER_POD = "workerGroupSpecs.0.template.spec"
JOB = "spec.rayClusterSpec."


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with credentials and the cluster's token, and a prompt file beside it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    (tmp_path / "prompts.csv").write_text("prompt,kind\na red star,1\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def manifest(name: str, place: Path) -> Any:
    """A shipped manifest with its EDIT lines edited: its job is the demo."""
    text = (KUBERAY / f"{name}.yaml").read_text().replace("registry.example.org", "ghcr.io/me")
    values = yaml.safe_load(text)
    if name == "serve":
        served = yaml.safe_load(values["spec"]["serveConfigV2"])
        args = served["applications"][0]["args"]
        del args["results"], args["registry"]
        args["auth"]["keys"][0]["sha256"] = "1" * 64
        values["spec"]["serveConfigV2"] = yaml.safe_dump(served)
    spec = values["spec"].get("jobTemplate", values["spec"])
    if "entrypoint" in spec:
        spec["entrypoint"] = command(place)
    return json.loads(json.dumps(values))  # without what YAML's aliases share


def command(place: Path, *more: str, config: Path = DEMO) -> str:
    return " ".join(["rayjobs generate", str(config), f"output.uri={place}/out", *more])


def launcher() -> Any:
    """cluster.yaml with its EDIT lines edited."""
    text = (ROOT / "cluster.yaml").read_text().replace("ami-00000000000000000", "ami-0abc")
    return yaml.safe_load(text)


def plant(values: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values[int(name) if isinstance(values, list) else name]
    key = int(last) if isinstance(values, list) else last
    if value is GONE:
        del values[key]
    else:
        values[key] = value


def findings(values: Any, place: Path) -> list[str]:
    path = place / "planted.yaml"
    path.write_text(json.dumps(values))
    return files.check(str(path), []).findings


IN_MANIFESTS = {
    "a field that the operator does not know": (
        "generate",
        "spec.backofLimit",
        3,
        "spec.backofLimit: unknown key; did you mean 'backoffLimit'?",
    ),
    "a field of a pod that Kubernetes does not know": (
        "generate",
        f"{JOB}{WORKER_POD}.tolerationz",
        [],
        "tolerationz: unknown key; did you mean 'tolerations'?",
    ),
    "a list where there is one": (
        "generate",
        f"{JOB}workerGroupSpecs",
        "gpu",
        "spec.rayClusterSpec.workerGroupSpecs is 'gpu'; it must be of type array",
    ),
    "a cluster that stays": (
        "generate",
        "spec.shutdownAfterJobFinishes",
        False,
        "shutdownAfterJobFinishes is false",
    ),
    "no time at all": (
        "dreambooth",
        "spec.activeDeadlineSeconds",
        0,
        "activeDeadlineSeconds is 0; it must be at least 1",
    ),
    "another Ray than the image's": (
        "generate",
        f"{JOB}rayVersion",
        "2.50.0",
        "rayVersion is 2.50.0",
    ),
    "more workers at least than at most": (
        "generate",
        f"{JOB}workerGroupSpecs.1.minReplicas",
        5,
        "workerGroupSpecs.1.minReplicas is 5, above its maxReplicas, 2",
    ),
    "two groups of one name": (
        "generate",
        f"{JOB}workerGroupSpecs.1.groupName",
        "gpu-spot",
        "groupName is gpu-spot, as another is",
    ),
    "a volume that is not there": (
        "generate",
        f"{JOB}{HEAD_POD}.containers.0.volumeMounts.1.name",
        "modles",
        "names 'modles', which is no volume",
    ),
    "objects on a disk": (
        "generate",
        f"{JOB}{WORKER_POD}.volumes.0.emptyDir",
        {},
        "no memory at /dev/shm",
    ),
    "pods that come back by themselves": (
        "generate",
        f"{JOB}{WORKER_POD}.restartPolicy",
        "Always",
        "restartPolicy is Always; with autoscaler v2 it must be Never",
    ),
    "half a GPU's limit": (
        "generate",
        f"{JOB}{WORKER_POD}.containers.0.resources.limits",
        {"cpu": "6", "memory": "48Gi"},
        "nvidia.com/gpu is 1 in requests and None in limits",
    ),
    "more memory than the limit": (
        "generate",
        f"{JOB}{WORKER_POD}.containers.0.resources.requests.memory",
        "64Gi",
        "requests.memory is 64Gi, above its limit, 48Gi",
    ),
    "no such hour": (
        "nightly",
        "spec.schedule",
        "every night",
        "spec.schedule is 'every night'; it must be five fields",
    ),
    "no such place": ("nightly", "spec.timeZone", "Europe/Bärlin", "which is no time zone"),
    "a serving key that is none": (
        "serve",
        "spec.serveConfigV2",
        "applications: [{import_path: serve.app:build, args: {models: [], modles: []}}]",
        "serveConfigV2: it: applications.0.args.modles: unknown key; did you mean 'models'?",
    ),
    "an image of nobody": (
        "cluster",
        f"spec.{HEAD_POD}.containers.0.image",
        "registry.example.org/rayjobs:gpu",
        "has registry.example.org/, a placeholder",
    ),
}
IN_ENTRYPOINTS = {
    "a key that is none": (DEMO, ["sampler.stepz=4"], "sampler.stepz: unknown key"),
    "half a quotation": (DEMO, ["'prompts.inline=[a star]"], "no shell takes it: No closing"),
    "more CPUs than a pod has": (
        DEMO,
        ["workers.num_cpus=7"],
        "workers: 2 workers ask for 7 CPUs and 0 GPUs each; there is 108 CPUs and 18 GPUs on 18 "
        "nodes (of up to 6 CPUs), which holds none",
    ),
    "no CPU left for Ray Data": (
        SDXL,
        ["workers.min=1", "workers.num_cpus=6"],
        "workers.num_cpus is 6, which leaves no CPU of a node free",
    ),
    "more workers than GPUs": (
        SDXL,
        ["workers.min=32"],
        "workers: 32 workers ask for 4 CPUs and 1 GPUs each; there is 108 CPUs and 18 GPUs",
    ),
    "pictures too large for the GPU": (
        SDXL,
        ["workers.min=1", "image.width=8192", "image.height=4096"],
        "the cluster's GPU has 44 GiB",
    ),
}
IN_CLUSTER_FILES = {
    "a key that is none": ("max_worker", 8, "max_worker: unknown key; did you mean 'max_workers'?"),
    "a name where there is a list": (
        "available_node_types.head",
        "m7i.xlarge",
        "available_node_types.head is 'm7i.xlarge'; it must be of type object",
    ),
    "no head": ("head_node_type", "haed", "head_node_type is 'haed'"),
    "more nodes than there may be": (
        "available_node_types.gpu-spot.max_workers",
        9,
        "gpu-spot.max_workers is 9, above max_workers of the whole, 8",
    ),
    "more at least than at most": (
        "available_node_types.gpu-on-demand.min_workers",
        3,
        "gpu-on-demand.min_workers is 3, above its max_workers, 2",
    ),
    "an instance type that is none": (
        "available_node_types.head.node_config.InstanceType",
        "m7i.xlrge",
        "head.node_config.InstanceType is 'm7i.xlrge'",
    ),
    "a key that EC2 does not know": (
        "available_node_types.gpu-spot.node_config.InstanceMarketOption",
        {"MarketType": "spot"},
        "gpu-spot.node_config.InstanceMarketOption is unknown",
    ),
    "an image of nobody": (
        "available_node_types.head.node_config.ImageId",
        "ami-00000000000000000",
        "head.node_config.ImageId is ami-00000000000000000, a placeholder",
    ),
    "a zone elsewhere": (
        "provider.availability_zone",
        "us-west-2a,us-east-1b",
        "us-east-1b is not in us-west-2",
    ),
    "a command that no shell takes": (
        "initialization_commands",
        ["if true; then echo"],
        "initialization_commands[0]: no shell takes it",
    ),
    "another region in the shells": (
        "setup_commands",
        ["export AWS_DEFAULT_REGION=eu-west-1"],
        "setup_commands[0] sets the region eu-west-1, but provider.region is us-west-2",
    ),
    "no token": (
        "file_mounts",
        {"~/.ray/auth_token": "~/ray/auth_token"},
        "there is no ~/ray/auth_token here; make it by `ray get-auth-token --generate`",
    ),
}
IN_SERVING = {
    "anybody may ask": ("auth", {}, "http_options.host is 0.0.0.0, which other machines can reach"),
    "no such adapter": (
        "loras",
        [{"name": "dog", "uri": "runs/dog"}],
        "loras[0].uri: runs/dog: nothing is there",
    ),
    "more rows than the GPU holds": (
        "engine",
        {"max_rows": 256},
        "memory: a worker takes at least",
    ),
}
IN_CONFIGURATIONS = {
    "no such column": (["prompts.column=text"], "has no column 'text'; it has prompt, kind"),
    "no such prompts": (["prompts.uri={place}/none.csv"], "none.csv: nothing is there"),
    "no place to write": (["output.uri={place}/prompts.csv"], "is a file, not a folder"),
    "no such adapter": (["model.loras=[{{uri: {place}/lora}}]"], "lora: nothing is there"),
    "no such model": (["model.uri={place}/model"], "does not exist"),
    "a key that is none": (["engine.batchsize=4"], "engine.batchsize: unknown key"),
    "no room on the cluster": (["workers.num_gpus=2"], "a worker asks for 1 CPUs and 2 GPUs"),
}


@pytest.mark.parametrize("planted", IN_MANIFESTS)
def test_in_a_manifest(planted: str, place: Path) -> None:
    name, path, value, expected = IN_MANIFESTS[planted]
    values = manifest(name, place)
    plant(values, path, value)
    [found] = findings(values, place)
    assert expected in found


@pytest.mark.parametrize("planted", IN_ENTRYPOINTS)
def test_in_an_entrypoint(planted: str, place: Path) -> None:
    config, more, expected = IN_ENTRYPOINTS[planted]
    values = manifest("generate", place)
    prompts = [] if config == DEMO else [f"prompts.uri={place}/prompts.csv"]
    values["spec"]["entrypoint"] = command(place, *more, *prompts, config=config)
    [found] = findings(values, place)
    assert expected in found


@pytest.mark.parametrize("planted", IN_CLUSTER_FILES)
def test_in_a_cluster_file(planted: str, place: Path) -> None:
    path, value, expected = IN_CLUSTER_FILES[planted]
    values = launcher()
    values["file_mounts"].pop("~/rayjobs")
    plant(values, path, value)
    [found] = findings(values, place)
    assert expected in found


@pytest.mark.parametrize("planted", IN_SERVING)
def test_in_a_serving_file(planted: str, place: Path) -> None:
    key, value, expected = IN_SERVING[planted]
    served = yaml.safe_load(manifest("serve", place)["spec"]["serveConfigV2"])
    served["applications"][0]["args"][key] = value
    path = place / "serve.yaml"
    path.write_text(json.dumps(served))
    (place / "cluster.yaml").write_text(json.dumps(manifest("cluster", place)))
    [found] = files.check(str(path), [], str(place / "cluster.yaml")).findings
    assert expected in found


@pytest.mark.parametrize("planted", IN_CONFIGURATIONS)
def test_in_a_configuration(planted: str, place: Path) -> None:
    more, expected = IN_CONFIGURATIONS[planted]
    values = {
        "model": {"uri": "starter"},
        "prompts": {"uri": f"{place}/prompts.csv"},
        "output": {"uri": f"{place}/out"},
    }
    path = place / "job.yaml"
    path.write_text(json.dumps(values))
    machines = str(KUBERAY / "cluster.yaml") if "workers" in more[0] else None
    report = files.check(str(path), [each.format(place=place) for each in more], machines)
    [found] = [line for line in report.findings if "placeholder" not in line]
    assert expected in found


def test_a_training_that_does_not_fit(place: Path) -> None:
    (place / "dog").mkdir()
    planted = ["train.method=full", f"instance.uri={place}/dog", f"output.uri={place}/out"]
    config = str(ROOT / "configs" / "dreambooth.yaml")
    cluster = str(KUBERAY / "cluster.yaml")  # an L40S of 44 GiB
    for optimizer, gib, fits in (("adamw", 38.3, True), ("prodigy", 57.4, False)):
        report = files.check(config, [*planted, f"train.optimizer={optimizer}"], cluster)
        assert any(f"memory of a worker: at least {gib} GiB" in fact for fact in report.facts)
        assert fits != any("the cluster's GPU has 44 GiB" in line for line in report.findings)


@pytest.mark.parametrize("name", ["cluster", "generate", "dreambooth", "nightly", "serve"])
def test_nothing_is_found_where_nothing_is_planted(name: str, place: Path) -> None:
    assert findings(manifest(name, place), place) == []


def test_exit_codes_and_the_last_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "cluster.yaml"
    path.write_text(json.dumps(launcher()))
    (place / "planted.yaml").write_text(json.dumps(launcher() | {"max_worker": 1}))
    (place / "x").symlink_to(ROOT)
    assert main(["check", str(path)]) == 0
    assert main(["check", str(place / "planted.yaml")]) == 2
    assert main(["check", str(place / "none.yaml")]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].endswith("cluster.yaml: nothing is wrong")
    assert lines[-1].endswith("planted.yaml: 1 mistake")
    assert "none.yaml: No such file" in said.err
