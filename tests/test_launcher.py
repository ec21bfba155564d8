"""cluster.yaml without a cloud: Ray's launcher takes it, and EC2 would."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayjobs.check.launcher import node_mistakes

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture
def launcher() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_launcher_takes_the_file(launcher: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(launcher))
    validate_config(prepared)
    head = prepared["available_node_types"]["head"]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    mounted = {name for name in launcher["file_mounts"].values() if not name.startswith("~")}
    assert all((ROOT / name).exists() for name in mounted)


def test_nodes_are_what_ec2_understands(launcher: dict[str, Any]) -> None:
    for node_type in launcher["available_node_types"].values():
        assert node_mistakes(node_type["node_config"]) == []
        disk = node_type["node_config"]["BlockDeviceMappings"][0]
        assert disk["Ebs"]["VolumeSize"] >= 100
    node = launcher["available_node_types"]["gpu-spot"]["node_config"]
    wrong = {"InstanceTyp": "x", "InstanceType": "g9.huge", "IamInstanceProfile": {"Nme": "x"}}
    assert node_mistakes(node | wrong) == [
        "InstanceType is 'g9.huge'",
        "IamInstanceProfile.Nme is unknown",
        "InstanceTyp is unknown",
    ]


@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_are_bash(launcher: dict[str, Any], kind: str) -> None:
    assert launcher[kind]
    for command in launcher[kind]:
        subprocess.run(["bash", "-n"], input=command, text=True, check=True, timeout=10)


def test_shells_on_a_node_know_the_token_and_the_python(
    launcher: dict[str, Any], tmp_path: Path
) -> None:
    [command] = [line for line in launcher["setup_commands"] if ".bashrc" in line]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    shown = "source ~/.bashrc; echo $PATH $RAY_AUTH_MODE $AWS_DEFAULT_REGION"
    for line in (command, command, shown):  # as at the first start, and at an update
        done = subprocess.run(["bash", "-c", line], env=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    region = launcher["provider"]["region"]
    assert done.stdout.split() == [f"{tmp_path}/venv/bin:/usr/bin:/bin", "token", region]
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 3


@pytest.mark.model
@pytest.mark.slow
def test_the_launcher_starts_every_node_type(s3_server: str, tmp_path: Path) -> None:
    """Ray's own AWS code against moto, which knows EC2 too, in a process and home of its own."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    settings = keys | {"AWS_ENDPOINT_URL": s3_server, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCH, str(ROOT / "cluster.yaml")],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "head": [0, None, "m7i.xlarge", None],
        "gpu-on-demand": [8, 1, "g6e.2xlarge", None],
        "gpu-spot": [8, 1, "g6e.2xlarge", "spot"],
    }


LAUNCH = """
import json, sys
import boto3, yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

config = prepare_config(yaml.safe_load(open(sys.argv[1])))
region = config["provider"]["region"]
nodes = [node_type["node_config"] for node_type in config["available_node_types"].values()]
for profile in {node["IamInstanceProfile"]["Name"] for node in nodes}:
    boto3.client("iam", region_name=region).create_instance_profile(InstanceProfileName=profile)
config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
made = {}
for name, node_type in config["available_node_types"].items():
    [node] = provider.create_node(node_type["node_config"], {}, 1)
    found = boto3.client("ec2", region_name=region).describe_instances(InstanceIds=[node])
    instance = found["Reservations"][0]["Instances"][0]
    resources = node_type["resources"]
    facts = [resources["CPU"], resources.get("GPU")]
    made[name] = [*facts, instance["InstanceType"], instance.get("InstanceLifecycle")]
print(json.dumps(made))
"""
