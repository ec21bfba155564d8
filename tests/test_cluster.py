"""cluster.yaml without a cloud, and jobs on a real cluster of three nodes with a token."""

import contextlib
import copy
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayjobs.cluster import REMEMBER_ADDRESS, local
from rayjobs.dataset.manifest import Manifest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
RAY = str(Path(sys.executable).parent / "ray")
GENERATE = (sys.executable, "-m", "rayjobs", "generate")
DEMO = ("configs/demo/generate.yaml", "prompts.axes.shape=[star]", "sampler.steps=4")
# One worker fits on a node of three CPUs, and a CPU is left for Ray Data's own tasks.
ONE_A_NODE = ("workers.min=2", "workers.num_cpus=2")


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
    assert all((ROOT / name).is_file() for name in mounted)


def test_nodes_are_what_ec2_understands(launcher: dict[str, Any]) -> None:
    for node_type in launcher["available_node_types"].values():
        assert mistakes(node_type["node_config"]) == []
        disk = node_type["node_config"]["BlockDeviceMappings"][0]
        assert disk["Ebs"]["VolumeSize"] >= 100
    node = launcher["available_node_types"]["gpu-spot"]["node_config"]
    wrong = {"InstanceTyp": "x", "InstanceType": "g9.huge", "IamInstanceProfile": {"Nme": "x"}}
    assert mistakes(node | wrong) == [
        "InstanceType is 'g9.huge'",
        "IamInstanceProfile.Nme is unknown",
        "InstanceTyp is unknown",
    ]


def mistakes(node_config: dict[str, Any]) -> list[str]:
    """What the EC2 API has no name for in a request for such an instance."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    return list(_mistakes(node_config, ec2.operation_model("RunInstances").input_shape, ""))


def _mistakes(value: Any, shape: Any, name: str) -> Iterator[str]:
    if shape.type_name == "structure":
        for key, part in value.items():
            inner = f"{name}.{key}".lstrip(".")
            if key in shape.members:
                yield from _mistakes(part, shape.members[key], inner)
            else:
                yield f"{inner} is unknown"
    elif shape.type_name == "list":
        for part in value:
            yield from _mistakes(part, shape.member, name)
    elif value not in (getattr(shape, "enum", None) or [value]):
        yield f"{name} is {value!r}"


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


class Cluster:
    """A head without CPUs and two nodes, started as cluster.yaml does, and a token of their own."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.token = secrets.token_hex(32)
        self.gcs, self.client, self.port = free_ports(3)
        self.address = f"http://127.0.0.1:{self.port}"
        self.environment = self.strangers_environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        self._nodes: list[subprocess.Popen[bytes]] = []

    @property
    def strangers_environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {"HOME": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self) -> None:
        ports = (f"--ray-client-server-port={self.client}", f"--dashboard-port={self.port}")
        self._start("--head", f"--port={self.gcs}", "--num-cpus=0", *ports)
        wait_for(lambda: self.ask("/api/version"), 60)
        for _ in range(2):
            self._start(f"--address=127.0.0.1:{self.gcs}", "--num-cpus=3")
        wait_for(lambda: len(self.ask("/nodes?view=summary")["data"]["summary"]) == 3, 60)

    def _start(self, *options: str) -> None:
        # A folder for each, as on hosts of their own: nodes delete a job's code when they are done.
        place = f"--temp-dir={self.folder}/{len(self._nodes)}"
        [agent] = free_ports(1)
        own = ("--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}")
        store = f"--object-store-memory={80 * 2**20}"
        with (self.folder / "start.out").open("ab") as log:
            node = subprocess.Popen(
                [RAY, "start", "--block", place, *own, store, *options],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._nodes.append(node)

    def ask(self, path: str, **headers: str) -> Any:
        """What the dashboard answers; with the token, unless other headers are given."""
        named = headers or {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.address}{path}", headers=named)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise

    def ray(self, *command: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
        """Exit code and output of `ray job ...` as a user would call it."""
        done = subprocess.run(
            [RAY, "job", command[0], "--address", self.address, *command[1:]],
            cwd=self.folder / "repository",
            env=environment or self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    def submit(self, name: str, *settings: str, wait: bool = True) -> tuple[int, str]:
        options = ["--working-dir", ".", "--submission-id", name, *([] if wait else ["--no-wait"])]
        return self.ray("submit", *options, "--", *GENERATE, *settings, *ONE_A_NODE)

    def close(self) -> None:
        for node in self._nodes:  # ray start --block ends what it started, if slowly
            node.terminate()
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(ready: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except (OSError, KeyError):
            pass
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as folder:
        copy_repository(Path(folder, "repository"))
        made = Cluster(folder)
        try:
            made.start()
            yield made
        finally:
            made.close()


def copy_repository(target: Path) -> None:
    """What git knows or would take, and beside it what must not be uploaded."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    for folder in (".venv", "build", "demo"):
        (target / folder).mkdir()
        (target / folder / "large").write_bytes(bytes(1000))


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_uses_every_node(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    own = (f"output.uri={output}", "output.images_per_shard=1", "seeds.count=2")
    code, said = cluster.submit("first", *DEMO, *own)
    assert code == 0, said
    assert sum(entry["rows"] for entry in Manifest(str(output)).entries()) == 16
    assert (output / "index.html").is_file()
    assert len(nodes_of(cluster, "first")) == 2
    [package] = cluster.folder.glob(
        "0/session_latest/runtime_resources/working_dir_files/*/rayjobs/.."
    )
    files = [path for path in package.resolve().rglob("*") if path.is_file()]
    assert not [path for path in files if path.name == "large"]
    assert sum(path.stat().st_size for path in files) < 20e6


def nodes_of(cluster: Cluster, name: str) -> set[str]:
    """The nodes that a job's workers were on."""
    found = cluster.ask("/api/v0/actors?detail=true&limit=1000")["data"]["result"]["result"]
    number = cluster.ask(f"/api/jobs/{name}")["job_id"]
    workers = [actor for actor in found if "ShardWorker" in json.dumps(actor)]
    return {actor["node_id"] for actor in workers if actor["job_id"] == number}


@pytest.mark.ray
@pytest.mark.slow
def test_nobody_gets_in_without_the_token(cluster: Cluster, tmp_path: Path) -> None:
    for headers, status in (({"Accept": "*/*"}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            cluster.ask("/api/jobs/", **headers)
        assert refused.value.code == status
    command = ("submit", "--working-dir", ".", "--", "touch", str(tmp_path / "was-here"))
    code, said = cluster.ray(*command, environment=cluster.strangers_environment)
    assert code != 0
    assert "authentication is enabled" in said
    assert not (tmp_path / "was-here").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_exit_codes_are_seen(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    prompts = f"prompt,init_image\na red star,{tmp_path}/broken.png\na blue ring,\n"
    (tmp_path / "prompts.csv").write_text(prompts)
    job = {
        "model": {"uri": "starter"},
        "prompts": {"uri": str(tmp_path / "prompts.csv")},
        "sampler": {"name": "euler", "steps": 2},
        "output": {"uri": str(tmp_path / "out")},
    }
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(job))
    for name, expected, *settings in (("bad-input", 2, "output.uri=ftp://x"), ("some-failed", 3)):
        code, said = cluster.submit(name, str(config), *settings)
        assert code != 0, said
        assert f"exit code {expected}" in said, said
        assert cluster.ask(f"/api/jobs/{name}")["driver_exit_code"] == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_job_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    own = (f"output.uri={output}", "output.images_per_shard=4", "seeds.count=12")
    code, said = cluster.submit("stopped", *DEMO, *own, wait=False)
    assert code == 0, said
    wait_for(lambda: len(list((output / "manifest").glob("*.json"))) >= 1, 240)
    code, said = cluster.ray("stop", "stopped")
    assert code == 0, said
    assert cluster.ask("/api/jobs/stopped")["status"] == "STOPPED"
    before = {entry["shard"]: entry for entry in Manifest(str(output)).entries()}
    assert 1 <= len(before) < 24
    code, said = cluster.submit("goes-on", *DEMO, *own)
    assert code == 0, said
    after = {entry["shard"]: entry for entry in Manifest(str(output)).entries()}
    assert sorted(after) == list(range(24))
    assert {shard: after[shard] for shard in before} == before


BESIDE = """
import ray
from ray.cluster_utils import Cluster
from rayjobs import cluster

class Living:
    def id(self):
        return ray.get_runtime_context().get_actor_id()

def look_for(actor):
    from ray.util.state import get_actor
    from ray.util.state.exception import RayStateApiException
    try:
        return get_actor(actor) is not None
    except RayStateApiException:
        return "nobody knows"

with cluster.session(2):
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    living = ray.remote(Living).remote()
    actor = ray.get(living.id.remote())
    found = ray.get(ray.remote(look_for).remote(actor))
    assert found, "it was said to be dead"
    other.shutdown()
"""


def test_a_local_cluster_has_a_dashboard_s_address_of_its_own() -> None:
    """Ray's is 8265 everywhere, also where there is no dashboard."""
    options = [local(num_cpus=1) for _ in range(2)]
    assert len({8265} | {each["dashboard_port"] for each in options}) == 3
    assert all(each["runtime_env"] == REMEMBER_ADDRESS for each in options)


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_is_not_sought_in_the_cluster_beside() -> None:
    """Ray Train ends a training whose controller is said to be dead."""
    command, environment = [sys.executable, "-c", BESIDE], os.environ | {"RAY_ADDRESS": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
