"""What is submitted and deployed to a real cluster of three nodes with a token.

The nodes' Python has the libraries and not this project, as those of a cluster do.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.dataset.manifest import Manifest
from tests.nodes import ROOT, bare_python, copy_repository, install, wait_for
from tests.servers import free_ports

# Every test uses a cluster that takes a minute to start.
pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
DEMO = ("configs/demo/generate.yaml", "prompts.axes.shape=[star]", "sampler.steps=4")
# One worker fits on a node of three CPUs, and a CPU is left for Ray Data's own tasks.
ONE_A_NODE = ("workers.min=2", "workers.num_cpus=2")


class Cluster:
    """A head without CPUs and two nodes, started as cluster.yaml does, and a token of their own."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.python = bare_python(self.folder / "python")
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
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
        return kept | {"HOME": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self) -> None:
        ports = (f"--ray-client-server-port={self.client}", f"--dashboard-port={self.port}")
        self._start("--head", f"--port={self.gcs}", "--num-cpus=0", *ports)
        wait_for(lambda: self.ask("/api/version"), 180)
        for _ in range(2):
            self._start(f"--address=127.0.0.1:{self.gcs}", "--num-cpus=3")
        wait_for(lambda: len(self.ask("/nodes?view=summary")["data"]["summary"]) == 3, 180)

    def _start(self, *options: str) -> None:
        # A folder for each, as on hosts of their own: nodes delete a job's code when they are done.
        place = f"--temp-dir={self.folder}/{len(self._nodes)}"
        [agent] = free_ports(1)
        own = ("--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}")
        store = f"--object-store-memory={80 * 2**20}"
        with (self.folder / "start.out").open("ab") as log:
            node = subprocess.Popen(
                [*self._ray, "start", "--block", place, *own, store, *options],
                cwd=self.folder,  # not here, where the project is
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._nodes.append(node)

    @property
    def _ray(self) -> tuple[str, ...]:
        return (self.python, "-m", "ray.scripts.scripts")

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
            [BIN / "ray", "job", command[0], "--address", self.address, *command[1:]],
            cwd=self.folder / "repository",
            env=environment or self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    def submit(self, name: str, *settings: str, wait: bool = True) -> tuple[int, str]:
        options = ["--working-dir", ".", "--submission-id", name, *([] if wait else ["--no-wait"])]
        generate = (self.python, "-m", "rayjobs", "generate")
        return self.ray("submit", *options, "--", *generate, *settings, *ONE_A_NODE)

    def rayjobs(
        self, *command: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`rayjobs submit` or `rayjobs stop` on this cluster, as a user would call it."""
        own = ("--python", self.python) if command[0] == "submit" else ()
        return subprocess.Popen(
            [sys.executable, "-m", "rayjobs", *command, "--address", self.address, *own],
            cwd=self.folder / "repository",
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def close(self) -> None:
        for node in self._nodes:  # ray start --block ends what it started, if slowly
            node.terminate()
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as folder:
        repository = Path(folder, "repository")
        copy_repository(repository)
        for name in (".venv", "build", "demo"):  # what must not be uploaded
            (repository / name).mkdir()
            (repository / name / "large").write_bytes(bytes(1000))
        made = Cluster(folder)
        try:
            made.start()
            yield made
        finally:
            made.close()


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
    strange = cluster.strangers_environment
    asked = cluster.rayjobs("submit", "generate", *DEMO, environment=strange)
    said = asked.communicate(timeout=60)[0]
    assert (asked.returncode, "RAY_AUTH_MODE=token" in said) == (2, True), said


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
    said = {}
    for expected, *settings in ((2, "output.uri=ftp://x"), (2, "output.uri=out"), (3,)):
        job = cluster.rayjobs("submit", "generate", str(config), *settings, *ONE_A_NODE)
        said[expected] = job.communicate(timeout=300)[0]
        assert job.returncode == expected, said[expected]
    assert re.search(r"package: [\d.]+ MB in \d+ files", said[3])
    assert "made 2 images" in said[3]


def test_a_stopped_job_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Submitted twice it runs once; Ctrl-C leaves it; after its end it goes on as another."""
    output = tmp_path / "out"
    own = (f"output.uri={output}", "output.images_per_shard=4", "seeds.count=12")
    command = ("submit", "generate", *DEMO, *own, *ONE_A_NODE)
    first = cluster.rayjobs(*command)
    assert first.stdout is not None
    lines = [first.stdout.readline() for _ in range(2)]
    [name] = re.findall(r"submitted (rayjobs-generate-\w+-1) to", "".join(lines))
    second = cluster.rayjobs(*command, "--wait", "no")
    said = second.communicate(timeout=60)[0]
    assert (second.returncode, f"{name} runs at" in said) == (0, True), said
    wait_for(lambda: len(list((output / "manifest").glob("*.json"))) >= 1, 240)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[0]
    assert (first.returncode, f"rayjobs stop {name}" in said) == (130, True), said
    assert cluster.ask(f"/api/jobs/{name}")["status"] == "RUNNING"
    wait_for(lambda: f'ray_rayjobs_images_total{{job="{output}"}}' in metrics(cluster), 60)
    stop = cluster.rayjobs("stop", name)
    said = stop.communicate(timeout=60)[0]
    assert (stop.returncode, f"stopped {name} in" in said) == (0, True), said
    assert cluster.ask(f"/api/jobs/{name}")["status"] == "STOPPED"
    before = {entry["shard"]: entry for entry in Manifest(str(output)).entries()}
    assert 1 <= len(before) < 24
    third = cluster.rayjobs(*command)
    said = third.communicate(timeout=300)[0]
    assert third.returncode == 0, said
    assert f"submitted {name[:-1]}2 to" in said
    after = {entry["shard"]: entry for entry in Manifest(str(output)).entries()}
    assert sorted(after) == list(range(24))
    assert {shard: after[shard] for shard in before} == before
    assert len([job for job in cluster.ask("/api/jobs/") if name[:-1] in str(job)]) == 2


def test_serving_is_deployed_once_the_nodes_have_the_code(cluster: Cluster, tmp_path: Path) -> None:
    [port] = free_ports(1)
    values = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    [application] = values["applications"]
    application["args"] = {
        "models": [{"name": "starter", "uri": "starter"}],
        "scaling": {"num_gpus": 0, "num_cpus": 1, "ingress": 1, "ingress_cpus": 0.5},
        "auth": {"keys": [{"name": "team", "sha256": hashlib.sha256(b"key").hexdigest()}]},
    }
    values |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(values))
    deploy(cluster, config)
    wait_for(lambda: state(cluster)["status"] == "DEPLOY_FAILED", 120)
    assert "No module named 'serve'" in state(cluster)["message"]
    install(cluster.python, cluster.folder / "repository")
    deploy(cluster, config)
    wait_for(lambda: state(cluster)["status"] == "RUNNING", 180)
    body = {"prompt": "a red star", "size": "64x64", "num_inference_steps": 2}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations",
        json.dumps(body).encode(),
        {"Authorization": "Bearer key", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["data"][0]["b64_json"]


def metrics(cluster: Cluster) -> str:
    """What Prometheus would find at all nodes, without the labels that Ray adds."""
    targets = next(cluster.folder.rglob("prom_metrics_service_discovery.json"))
    [found] = json.loads(targets.read_text())
    texts = []
    for target in found["targets"]:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            texts.append(answer.read().decode())
    return re.sub(r"\{.*?(job=\"[^\"]*\").*?\}", r"{\1}", "".join(texts))


def deploy(cluster: Cluster, config: Path) -> None:
    command = [BIN / "serve", "deploy", str(config), "--address", cluster.address]
    subprocess.run(command, cwd=cluster.folder, env=cluster.environment, check=True, timeout=120)


def state(cluster: Cluster) -> Any:
    return cluster.ask("/api/serve/applications/")["applications"]["images"]
